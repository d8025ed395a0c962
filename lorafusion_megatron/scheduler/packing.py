"""Packs the samples of one block into few microbatches: best fit decreasing."""

from collections.abc import Sequence

from lorafusion_megatron.types import Sample, padded


class Bin:
    """A microbatch under construction: knows its padded tokens as jobs' rows are added."""

    __slots__ = ("rows", "samples", "tokens")

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.rows: dict[int, int] = {}
        self.tokens = 0

    def grown(self, job: int, tokens: int, multiple: int) -> int:
        """Padded tokens of the bin with ``tokens`` more rows of ``job``."""
        rows = self.rows.get(job, 0)
        return self.tokens - padded(rows, multiple) + padded(rows + tokens, multiple)

    def add(self, sample: Sample, multiple: int) -> None:
        """Put ``sample`` in."""
        self.tokens = self.grown(sample.job, sample.tokens, multiple)
        self.rows[sample.job] = self.rows.get(sample.job, 0) + sample.tokens
        self.samples.append(sample)


def best_fit_decreasing(samples: Sequence[Sample], capacity: int, multiple: int) -> list[Bin]:
    """Pack ``samples`` into few bins: each, longest first, into the fullest bin that still holds it.

    Args:
        samples: at most one step of each job, none above ``capacity`` once padded.
        capacity: padded tokens of a bin.
        multiple: each job's rows of a bin are padded to a multiple of this.

    Returns:
        Bins in the order they were opened.
    """
    bins: list[Bin] = []
    for sample in sorted(samples, key=lambda s: (-s.tokens, s.job, s.step, s.position)):
        best: Bin | None = None
        best_tokens = -1
        for candidate in bins:
            tokens = candidate.grown(sample.job, sample.tokens, multiple)
            if best_tokens < tokens <= capacity:
                best, best_tokens = candidate, tokens
        if best is None:
            best = Bin()
            bins.append(best)
        best.add(sample, multiple)
    return bins
