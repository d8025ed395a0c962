"""Packing: greedy and exact against exhaustive search."""

import random
from collections.abc import Iterator, Sequence

import pytest

from lorafusion_megatron.scheduler.exact import pack_exactly
from lorafusion_megatron.scheduler.packing import best_fit_decreasing, fewest_bins_bound, padded_tokens, rows_from_bins
from lorafusion_megatron.scheduler.weights import Weights
from lorafusion_megatron.types import Sample
from tests.unit.scheduler.instances import samples


def all_packings(items: Sequence[Sample], capacity: int, multiple: int) -> Iterator[list[list[Sample]]]:
    """Every way to put the samples into bins, bins in the order of their first sample."""

    def place(index: int, bins: list[list[Sample]]) -> Iterator[list[list[Sample]]]:
        if index == len(items):
            yield bins
            return
        for at in range(len(bins) + 1):
            grown = [*bins[:at], [*(bins[at] if at < len(bins) else []), items[index]], *bins[at + 1 :]]
            if padded_tokens(grown[at], multiple) <= capacity:
                yield from place(index + 1, grown)

    return place(0, [])


def quality(bins: Sequence[Sequence[Sample]], multiple: int) -> tuple[int, int]:
    """Bins, and padded tokens of the emptiest: both to be small."""
    return len(bins), min(padded_tokens(part, multiple) for part in bins)


@pytest.mark.parametrize("seed", range(40))
def test_exact_packing_agrees_with_exhaustive_search(seed: int) -> None:
    rng = random.Random(seed)
    multiple, capacity = rng.choice([1, 8]), 64
    items = [
        sample
        for job in range(rng.randint(1, 3))
        for sample in samples(job, 1, [rng.randint(3, 48) for _ in range(rng.randint(1, 3))])
    ][:7]
    greedy = best_fit_decreasing(items, capacity, multiple)
    found, proven = pack_exactly(greedy, capacity, multiple, 10.0)
    best = min(quality(bins, multiple) for bins in all_packings(items, capacity, multiple))
    assert proven
    assert quality(found, multiple) == best
    assert sorted(s for part in found for s in map(key, part)) == sorted(map(key, items))
    assert fewest_bins_bound([s.tokens for s in items], capacity) <= best[0]


def key(sample: Sample) -> tuple[int, int]:
    return sample.job, sample.position


def test_exact_packing_beats_best_fit_where_that_is_not_best() -> None:
    # Best fit decreasing needs 3 bins of 10 for 4+4 | 3+3+3 ... ; 4+3+3 and 4+3+3 fit two.
    items = samples(0, 1, [4, 4, 3, 3, 3, 3])
    greedy = best_fit_decreasing(items, 10, 1)
    assert len(greedy) == 3
    found, proven = pack_exactly(greedy, 10, 1, 10.0)
    assert (len(found), proven) == (2, True)


def test_without_time_the_hint_stays() -> None:
    items = samples(0, 1, [4, 4, 3, 3, 3, 3])
    greedy = best_fit_decreasing(items, 10, 1)
    found, _ = pack_exactly(greedy, 10, 1, 1e-9)
    assert quality(found, 1) <= quality(greedy, 1)


def test_padding_of_each_job_counts() -> None:
    items = [*samples(0, 1, [9]), *samples(1, 1, [9])]
    assert len(best_fit_decreasing(items, 24, 1)) == 1
    assert len(best_fit_decreasing(items, 24, 8)) == 2
    assert len(best_fit_decreasing(items, 32, 8)) == 1


@pytest.mark.parametrize(
    ("tokens", "capacity", "bound"), [([5, 5, 5], 10, 2), ([6, 6, 6], 10, 3), ([9, 2, 9, 2], 10, 3), ([10], 10, 1)]
)
def test_bound_on_bins(tokens: list[int], capacity: int, bound: int) -> None:
    assert fewest_bins_bound(tokens, capacity) == bound


def test_bins_are_split_so_that_no_replica_idles() -> None:
    weights = Weights()
    items = samples(0, 1, [4, 4, 4, 2])
    rows = rows_from_bins([tuple(items)], 2, 20, weights)
    assert [[sum(s.tokens for s in part) for part in row.parts] for row in rows] == [[8, 6]]
    lonely = rows_from_bins([samples(0, 1, [4])], 2, 20, weights)
    assert [[len(part) for part in row.parts] for row in lonely] == [[1, 0]]
