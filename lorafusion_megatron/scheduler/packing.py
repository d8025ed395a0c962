"""Packs the samples of one block into few microbatches: best fit decreasing, and the bounds it is judged by."""

from collections.abc import Sequence

from lorafusion_megatron.scheduler.rows import Row, Samples
from lorafusion_megatron.scheduler.weights import Weights
from lorafusion_megatron.types import Sample, padded


class Bin:
    """A microbatch under construction: knows its padded tokens as rows of jobs are added."""

    __slots__ = ("rows", "samples", "squares", "tokens")

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.samples: list[Sample] = []
        self.tokens = 0
        self.squares = 0

    def grown(self, job: int, tokens: int, multiple: int) -> int:
        """Padded tokens with ``tokens`` more rows of ``job``."""
        rows = self.rows.get(job, 0)
        return self.tokens - padded(rows, multiple) + padded(rows + tokens, multiple)

    def room(self, job: int, capacity: int, multiple: int) -> int:
        """Tokens of ``job`` that still fit."""
        rows = self.rows.get(job, 0)
        others = self.tokens - padded(rows, multiple)
        return (capacity - others) // multiple * multiple - rows

    def add(self, sample: Sample, multiple: int) -> None:
        """Put ``sample`` in."""
        self.tokens = self.grown(sample.job, sample.tokens, multiple)
        self.rows[sample.job] = self.rows.get(sample.job, 0) + sample.tokens
        self.squares += sample.tokens * sample.tokens
        self.samples.append(sample)


def best_fit_decreasing(samples: Sequence[Sample], capacity: int, multiple: int) -> list[Samples]:
    """Pack ``samples`` into few bins: each, longest first, into the fullest bin that still holds it.

    Args:
        samples: at most one step of each job, none above ``capacity`` once padded.
        capacity: padded tokens of a bin.
        multiple: each job's rows of a bin are padded to a multiple of this.

    Returns:
        Bins, fullest first.
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
    return [tuple(b.samples) for b in sorted(bins, key=lambda b: -b.tokens)]


def padded_tokens(samples: Sequence[Sample], multiple: int) -> int:
    """Tokens of a microbatch of ``samples`` after each job's rows were padded."""
    rows: dict[int, int] = {}
    for sample in samples:
        rows[sample.job] = rows.get(sample.job, 0) + sample.tokens
    return sum(padded(count, multiple) for count in rows.values())


def fewest_bins_bound(tokens: Sequence[int], capacity: int) -> int:
    """Martello and Toth's L2: no packing of ``tokens`` uses fewer bins.

    ``max over k of |large| + |medium| + ceil((small + medium - room beside medium) / capacity)`` where, for a
    threshold k <= capacity / 2, large > capacity - k, medium > capacity / 2, small in [k, capacity / 2].
    """
    lengths = sorted(tokens, reverse=True)
    best = -(-sum(lengths) // capacity)
    for k in {length for length in lengths if 2 * length <= capacity} | {0}:
        large = sum(1 for length in lengths if length > capacity - k)
        medium = [length for length in lengths if length <= capacity - k and 2 * length > capacity]
        small = sum(length for length in lengths if k <= length and 2 * length <= capacity)
        room = len(medium) * capacity - sum(medium)
        best = max(best, large + len(medium) + max(0, -(-(small - room) // capacity)))
    return best


def rows_from_bins(bins: Sequence[Samples], replicas: int, capacity: int, weights: Weights) -> list[Row]:
    """Place a block's bins on positions of ``replicas`` microbatches each, bins of similar time together.

    Where the last position would be short of bins, the bins with most samples are split, so that no replica idles.

    Args:
        bins: microbatches of one block.
        replicas: data-parallel replicas.
        capacity: padded tokens of a microbatch (a split never exceeds it).
        weights: predicted time.

    Returns:
        Rows, slowest first.
    """
    bins = list(bins)
    while len(bins) % replicas:
        widest = max(range(len(bins)), key=lambda index: (len(bins[index]) > 1, weights.part(bins[index])))
        if len(bins[widest]) < 2:
            bins += [()] * (-len(bins) % replicas)
            break
        whole = bins.pop(widest)
        halves: tuple[list[Sample], list[Sample]] = ([], [])
        for sample in sorted(whole, key=lambda s: -s.tokens):
            min(halves, key=lambda half: sum(s.tokens for s in half)).append(sample)
        bins += map(tuple, halves)
    assert all(padded_tokens(samples, weights.multiple) <= capacity for samples in bins)
    bins.sort(key=weights.part, reverse=True)
    return [Row(tuple(bins[start : start + replicas])) for start in range(0, len(bins), replicas)]
