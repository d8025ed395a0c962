"""Grouping, merging, dependency repair, smoothing and refining, each on inputs small enough to follow."""

from itertools import pairwise

import pytest

from lorafusion_megatron.scheduler.closest import closest_sum
from lorafusion_megatron.scheduler.dependency import repair_distance
from lorafusion_megatron.scheduler.grouping import fewest_groups_that_fill, head_tail_groups
from lorafusion_megatron.scheduler.merge import merge_rows
from lorafusion_megatron.scheduler.refine import refine_rows
from lorafusion_megatron.scheduler.rows import find_step_ends, noop_row
from lorafusion_megatron.scheduler.smooth import smooth_rows
from lorafusion_megatron.scheduler.waits import waiting_time
from lorafusion_megatron.scheduler.weights import Weights
from tests.unit.scheduler.instances import row, samples


def test_groups_pair_long_with_short() -> None:
    assert head_tail_groups([100, 400, 200, 300], 2) == [[0, 1], [2, 3]]
    assert head_tail_groups([5.0, 5.0, 5.0], 3) == [[0], [1], [2]]
    assert head_tail_groups([1, 2, 3, 4, 5], 1) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("work", "distance", "count"),
    [([4, 4, 4, 4], 1, 1), ([4, 4, 4, 4], 4, 2), ([2] * 6, 8, 3), ([1, 1, 1, 1], 8, 4), ([9], 4, 1)],
)
def test_as_few_groups_as_fill_the_distance(work: list[float], distance: int, count: int) -> None:
    # Six jobs of 2: beside one of two groups stand 6 microbatches, beside one of three 8; 7 are needed.
    assert fewest_groups_that_fill(range(len(work)), work, distance) == count


def test_underfilled_neighbours_are_merged() -> None:
    a, b, c = samples(0, 1, [6]), samples(1, 1, [4]), samples(2, 1, [3])
    merged = merge_rows([row(a), row(b), row(c)], 10, 1, 1)
    assert [sorted(s.job for s in r.parts[0]) for r in merged] == [[0, 1], [2]]


def test_a_merge_never_brings_steps_of_a_job_closer_than_the_distance() -> None:
    first, other, second = samples(0, 1, [2]), samples(1, 1, [9]), samples(0, 2, [1])
    assert len(merge_rows([row(first), row(other), row(second)], 10, 1, 2)) == 3
    assert len(merge_rows([row(first), row(other), row(second)], 10, 1, 1)) == 2


def test_repair_inserts_the_fewest_noops() -> None:
    rows = [row(samples(0, 1, [1])), row(samples(1, 1, [1])), row(samples(0, 2, [1]))]
    repaired = repair_distance(rows, 4, 1)
    assert [r.is_noop for r in repaired] == [False, False, True, True, False]
    assert repair_distance(rows, 2, 1) == rows


def test_a_barrier_drains_between_global_batches_of_different_jobs() -> None:
    rows = [row(samples(0, 1, [1])), row(samples(0, 1, [1])), row(samples(1, 1, [1]))]
    assert [r.is_noop for r in repair_distance(rows, 3, 1, barrier=True)] == [False, False, True, True, False]


def test_smoothing_sorts_independent_positions() -> None:
    rows = [row(samples(job, 1, [tokens])) for job, tokens in enumerate([9, 1, 9, 1, 9, 1, 9, 1])]
    smooth = smooth_rows(rows, Weights(), distance=4, width=3)
    times = [r.parts[0][0].tokens for r in smooth]
    assert sorted(times) == [1, 1, 1, 1, 9, 9, 9, 9]
    assert waiting_time(times, 3) < waiting_time([9, 1, 9, 1, 9, 1, 9, 1], 3)
    assert sum(abs(a - b) for a, b in pairwise(times)) == 8


def test_smoothing_keeps_the_distance() -> None:
    rows = [row(samples(0, 1, [9])), row(samples(1, 1, [1])), row(samples(2, 1, [9])), row(samples(0, 2, [1]))]
    smooth = smooth_rows(rows, Weights(), distance=3, width=3)
    ends = {(end.job, end.step): end.position for end in find_step_ends(smooth)}
    assert ends[0, 2] - ends[0, 1] >= 3


def test_refining_levels_a_peak() -> None:
    a = samples(0, 1, [5, 5, 5, 1])
    rows = [row(a[:3]), row(a[3:]), row(samples(1, 1, [8]))]
    refined = refine_rows(rows, Weights(), capacity=20, distance=2, width=2)
    assert max(sum(s.tokens for s in r.parts[0]) for r in refined) == 10
    assert sorted(s.tokens for r in refined for s in r.parts[0] if s.job == 0) == [1, 5, 5, 5]


def test_refining_respects_capacity_and_distance() -> None:
    one, two = samples(0, 1, [5, 5]), samples(0, 2, [1])
    rows = [row(one), noop_row(1), row(two)]
    # A sample moved to the middle would end step 1 only one position before step 2.
    assert refine_rows(rows, Weights(), capacity=10, distance=2, width=2) == rows


def test_closest_sum_is_the_best_of_all_pairs_and_singles() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    exact = lambda chosen: sum(values[i] for i in chosen)  # noqa: E731
    assert sum(values[i] for i in closest_sum(values, 9.8, 0.0, exact)) == 10.0
    assert closest_sum(values, 0.2, 0.0, exact) == ()
    assert sum(values[i] for i in closest_sum(values, 13.0, 0.0, exact)) == 13.0
    forbidden = lambda chosen: None if 4 in chosen else exact(chosen)  # noqa: E731
    assert 4 not in closest_sum(values, 16.0, 0.0, forbidden)
