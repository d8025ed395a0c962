"""Whole schedules: random jobs, replicas, stages; bad input; each schedule's own character."""

import math
import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.build import PlanOptions, build_schedule
from lorafusion_megatron.scheduler.packing import padded_tokens
from lorafusion_megatron.scheduler.report import report_plan
from lorafusion_megatron.types import Schedule
from tests.unit.scheduler.instances import batches

lengths = st.lists(st.lists(st.lists(st.integers(1, 60), max_size=9), min_size=1, max_size=5), min_size=1, max_size=5)
pipelines = st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (4, 2)])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    lengths=lengths,
    pipeline=pipelines,
    replicas=st.integers(1, 3),
    multiple=st.sampled_from([1, 8]),
    kind=st.sampled_from(["staggered", "round_robin", "sequential"]),
    first_step=st.integers(1, 5),
)
def test_any_window_is_planned_exactly(
    lengths: list[list[list[int]]],
    pipeline: tuple[int, int],
    replicas: int,
    multiple: int,
    kind: str,
    first_step: int,
) -> None:
    jobs = batches(lengths, first_step=first_step, jobs=range(0, 2 * len(lengths), 2))
    options = PlanOptions(
        token_capacity=64,
        padding_multiple=multiple,
        stages=pipeline[0],
        virtual_stages=pipeline[1],
        replicas=replicas,
        schedule=kind,
        solver_seconds=0.01,
    )
    schedule = build_schedule(jobs, options)
    _check(schedule, jobs, options)
    assert build_schedule(jobs, options) == schedule


@pytest.mark.parametrize("pipeline", [(4, 2), (4, 3), (5, 2), (6, 2), (8, 2), (3, 4)], ids=str)
@pytest.mark.parametrize("samples", [1, 3, 5])
def test_interleaved_windows_of_any_length_are_planned(pipeline: tuple[int, int], samples: int) -> None:
    """Streams are weighed before they are filled up to whole groups, without which the order can't end."""
    jobs = batches([[[60] * samples] * 3, [[40] * samples] * 4], jobs=range(2))
    options = PlanOptions(token_capacity=64, stages=pipeline[0], virtual_stages=pipeline[1])
    _check(build_schedule(jobs, options), jobs, options)


def _check(schedule: Schedule, jobs: list, options: PlanOptions) -> None:  # type: ignore[type-arg]
    """The contract of a schedule, written down a second time without the planner's own checks."""
    distance = options.pipeline.distance()
    assert len(schedule.replicas) == options.replicas
    assert len({len(stream) for stream in schedule.replicas}) == 1
    assert schedule.num_microbatches == options.pipeline.accepted_count(schedule.num_microbatches)
    placed = [
        (sample, position)
        for stream in schedule.replicas
        for position, microbatch in enumerate(stream)
        for sample in microbatch.samples
    ]
    wanted = [sample for job in jobs for batch in job for sample in batch.samples]
    key = lambda sample: (sample.job, sample.step, sample.position)  # noqa: E731
    assert sorted((sample for sample, _ in placed), key=key) == sorted(wanted, key=key)
    for stream in schedule.replicas:
        for microbatch in stream:
            assert padded_tokens(microbatch.samples, options.padding_multiple) <= options.token_capacity
            names = [sample.job for sample in microbatch.samples]
            assert names == sorted(names)
            assert len({(s.job, s.step) for s in microbatch.samples}) == len(set(names))
    ends = {(end.job, end.step): end.position for end in schedule.step_ends}
    for job in jobs:
        for batch in job:
            positions = [p for s, p in placed if (s.job, s.step) == (batch.job, batch.step)]
            end = ends.pop((batch.job, batch.step))
            assert not positions or end == max(positions)
            before = next(
                (e.position for e in schedule.step_ends if (e.job, e.step) == (batch.job, batch.step - 1)), None
            )
            if before is not None:
                assert min(positions, default=end) >= before + distance
    assert not ends


def test_full_microbatches_keep_four_stages_busy() -> None:
    rng = random.Random(1)
    jobs = batches([[[rng.randint(20, 200) for _ in range(32)] for _ in range(16)] for _ in range(4)])
    options = PlanOptions(token_capacity=1024, stages=4)
    report = report_plan(build_schedule(jobs, options), jobs, options)
    assert report.noops == 0
    assert report.microbatches <= 1.02 * report.fewest_microbatches + 1
    edges = 3 / (report.microbatches + 3)
    assert report.bubble_share <= edges + 0.02


def test_the_baselines_lose_what_the_paper_says_they_lose() -> None:
    rng = random.Random(2)
    jobs = batches([[[rng.randint(20, 400) for _ in range(16)] for _ in range(12)] for _ in range(4)])
    share = {}
    for kind in ("staggered", "round_robin", "sequential"):
        options = PlanOptions(token_capacity=1024, stages=4, schedule=kind)
        share[kind] = report_plan(build_schedule(jobs, options), jobs, options).bubble_share
    assert share["staggered"] < 0.04
    assert share["staggered"] < share["round_robin"] < share["sequential"]
    assert share["sequential"] > 0.3


def test_jobs_without_enough_samples_get_small_microbatches_not_bubbles() -> None:
    # Four jobs of one full microbatch a step on 8 stages: full microbatches would leave 4 of 8 positions empty.
    jobs = batches([[[32] * 8 for _ in range(12)] for _ in range(4)])
    options = PlanOptions(token_capacity=256, stages=8)
    report = report_plan(build_schedule(jobs, options), jobs, options)
    assert report.noops <= 4
    assert report.microbatches > 1.5 * report.fewest_microbatches
    assert report.bubble_share < 0.2


def test_replicas_are_balanced() -> None:
    rng = random.Random(4)
    jobs = batches([[[rng.randint(20, 200) for _ in range(48)] for _ in range(8)] for _ in range(3)])
    schedule = build_schedule(jobs, PlanOptions(token_capacity=1024, stages=2, replicas=3))
    work = [sum(microbatch.padded_tokens(1) for microbatch in stream) for stream in schedule.replicas]
    assert max(work) <= 1.01 * min(work)


def test_jobs_of_different_length_end_together() -> None:
    jobs = batches([[[100] * 8] * 24, [[100] * 8] * 6, [[100] * 8] * 12])
    schedule = build_schedule(jobs, PlanOptions(token_capacity=200, stages=2))
    last = {end.job: end.position for end in schedule.step_ends}
    assert schedule.num_microbatches == 42 * 4
    assert min(last.values()) > 0.8 * schedule.num_microbatches


def test_a_batch_that_just_fits_is_not_cut() -> None:
    jobs = batches([[[100] * 8] * 6] * 4)
    schedule = build_schedule(jobs, PlanOptions(token_capacity=800, stages=2))
    assert schedule.num_microbatches == 24


@pytest.mark.parametrize("kind", ["staggered", "round_robin", "sequential"])
def test_a_sample_above_the_capacity_is_refused(kind: str) -> None:
    jobs = batches([[[10, 60]]])
    options = PlanOptions(token_capacity=63, padding_multiple=8, schedule=kind)
    with pytest.raises(
        UserError, match=r"sample of 60 tokens \(job 0, step 1\); a microbatch holds 63 tokens in multi"
    ):
        build_schedule(jobs, options)


def test_nothing_to_plan_is_refused() -> None:
    with pytest.raises(UserError, match="at least one job"):
        build_schedule([], PlanOptions(token_capacity=8))
    with pytest.raises(UserError, match="at least one job"):
        build_schedule([[], []], PlanOptions(token_capacity=8))


@pytest.mark.parametrize("key", ["token_capacity", "padding_multiple", "stages", "virtual_stages", "replicas"])
def test_limits_below_one_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} 0; it must be at least 1"):
        PlanOptions(**{"token_capacity": 8, key: 0})


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="schedule 'fifo'; it must be one of staggered"):
        PlanOptions(token_capacity=8, schedule="fifo")


def test_a_global_batch_without_samples_still_steps() -> None:
    schedule = build_schedule(batches([[[5], [], [5]]]), PlanOptions(token_capacity=8, stages=2))
    assert [(end.step, end.position) for end in schedule.step_ends] == [(1, 0), (2, 2), (3, 4)]


def _lengths(rng: random.Random, median: int, samples: int) -> list[int]:
    return [max(1, min(2000, round(rng.lognormvariate(math.log(median), 0.6)))) for _ in range(samples)]


@pytest.mark.parametrize("replicas", [1, 2, 8])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.parametrize(("median", "samples"), [(60, 16), (150, 32), (400, 8)])
def test_staggered_is_no_slower_than_what_others_do(
    replicas: int, stages: int, jobs: int, median: int, samples: int
) -> None:
    """Also where many replicas share few samples, and where padding is longer than the samples."""
    rng = random.Random(0)
    given_jobs = batches([[_lengths(rng, median, samples) for _ in range(12)] for _ in range(jobs)])
    seconds = {}
    for kind in ("staggered", "round_robin", "sequential"):
        options = PlanOptions(token_capacity=2048, padding_multiple=64, stages=stages, replicas=replicas, schedule=kind)
        schedule = build_schedule(given_jobs, options)
        seconds[kind] = report_plan(schedule, given_jobs, options).predicted_seconds
    assert seconds["staggered"] <= 1.02 * min(seconds.values())


def test_samples_much_shorter_than_their_padding_share_microbatches() -> None:
    """Each takes a tile if it is alone with its job."""
    jobs = batches([[[1] * 33] * 4, [[2, 1, 1]] * 6], jobs=range(2))
    options = PlanOptions(token_capacity=64, padding_multiple=64)
    assert build_schedule(jobs, options).num_microbatches == 4 + 6


@pytest.mark.timeout(20)
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_window_of_one_very_large_batch_is_planned_at_once(replicas: int) -> None:
    """As a validation's: all rows of a data set are one global batch."""
    rng = random.Random(0)
    jobs = batches([[[rng.randint(2, 50) for _ in range(20_000)]], [[9, 8]]])
    started = time.process_time()
    build_schedule(jobs, PlanOptions(token_capacity=128, stages=2, replicas=replicas))
    assert time.process_time() - started < 10.0
