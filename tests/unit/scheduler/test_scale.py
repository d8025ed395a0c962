"""A part of what `scripts/bench/planner_scale.py` plans: bounded time a sample and bounded memory."""

import random
import time
import tracemalloc

from lorafusion_megatron.scheduler.build import PlanOptions, build_schedule
from tests.unit.scheduler.instances import batches


def _window(jobs: int, batch: int, first_step: int) -> list:  # type: ignore[type-arg]
    rng = random.Random(first_step)
    return batches([[[rng.randint(50, 900) for _ in range(batch)]] for _ in range(jobs)], first_step=first_step)


def test_sixteen_stages_and_many_replicas_in_streaming_windows() -> None:
    options = PlanOptions(token_capacity=2048, padding_multiple=64, stages=16, replicas=8)
    peaks = []
    tracemalloc.start()
    for step in range(1, 5):
        tracemalloc.reset_peak()
        jobs = _window(jobs=40, batch=16, first_step=step)
        schedule = build_schedule(jobs, options)
        assert len(schedule.step_ends) == 40
        assert schedule.num_microbatches <= 40
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    # Nothing stays but the window before, whose names are still bound here while the next is planned.
    assert max(peaks[2:]) < 1.2 * peaks[1]


def test_time_a_sample_does_not_grow_with_the_number_of_jobs() -> None:
    options = PlanOptions(token_capacity=2048, stages=4)
    few, many = _window(jobs=10, batch=160, first_step=1), _window(jobs=400, batch=4, first_step=1)
    seconds = []
    for jobs in (few, many):
        started = time.process_time()
        build_schedule(jobs, options)
        seconds.append(time.process_time() - started)
    assert seconds[1] < 3 * seconds[0] + 0.2
