"""Small planning problems for the tests of this folder."""

from collections.abc import Sequence

from lorafusion_megatron.scheduler.rows import Row
from lorafusion_megatron.types import GlobalBatch, Sample

Lengths = Sequence[Sequence[Sequence[int]]]
"""Per job, per step, the lengths of the samples."""


def samples(job: int, step: int, lengths: Sequence[int]) -> tuple[Sample, ...]:
    """Samples of one global batch."""
    return tuple(
        Sample(job=job, step=step, position=i, row=i, tokens=n, batch_label_tokens=sum(lengths))
        for i, n in enumerate(lengths)
    )


def batches(lengths: Lengths, *, first_step: int = 1, jobs: Sequence[int] | None = None) -> list[list[GlobalBatch]]:
    """Global batches of jobs 0, 1, … (or of ``jobs``)."""
    names = jobs if jobs is not None else range(len(lengths))
    return [
        [
            GlobalBatch(job=job, step=step, samples=samples(job, step, batch), label_tokens=sum(batch))
            for step, batch in enumerate(steps, start=first_step)
        ]
        for job, steps in zip(names, lengths, strict=True)
    ]


def row(*parts: Sequence[Sample]) -> Row:
    """A position with one part per replica."""
    return Row(tuple(tuple(part) for part in parts))
