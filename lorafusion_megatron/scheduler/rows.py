"""A position of the stream while it is being planned, and what the passes share about positions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorafusion_megatron.types import Microbatch, Sample, StepEnd

Samples = tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One position: a microbatch's samples per replica, in any order; all empty is a no-op."""

    parts: tuple[Samples, ...]
    empty_steps: tuple[tuple[int, int], ...] = ()
    """(job, step) of global batches without a sample that end here."""

    @property
    def is_noop(self) -> bool:
        """Whether no replica has a sample."""
        return not any(self.parts)

    def steps(self) -> set[tuple[int, int]]:
        """(job, step) that have a part of themselves here."""
        return {(sample.job, sample.step) for part in self.parts for sample in part} | set(self.empty_steps)


def noop_row(replicas: int) -> Row:
    """A position where no replica has a sample."""
    return Row(((),) * replicas)


def whole_groups(rows: Sequence[Row], count: int, replicas: int) -> list[Row]:
    """A stream filled up with no-ops to the ``count`` positions that its schedule takes (`Pipeline.accepted_count`)."""
    return [*rows, *[noop_row(replicas)] * (count - len(rows))]


def find_step_ends(rows: Iterable[Row]) -> tuple[StepEnd, ...]:
    """Where each (job, step) ends, by (position, job)."""
    last: dict[tuple[int, int], int] = {}
    for position, row in enumerate(rows):
        last.update(dict.fromkeys(row.steps(), position))
    ends = [StepEnd(job=job, step=step, position=position) for (job, step), position in last.items()]
    return tuple(sorted(ends, key=lambda end: (end.position, end.job)))


def to_streams(rows: Sequence[Row], replicas: int) -> tuple[tuple[Microbatch, ...], ...]:
    """Per replica its microbatches, samples in the order (job, step, position)."""

    def microbatch(samples: Samples) -> Microbatch:
        return Microbatch(samples=tuple(sorted(samples, key=lambda s: (s.job, s.step, s.position))))

    return tuple(tuple(microbatch(row.parts[replica]) for row in rows) for replica in range(replicas))
