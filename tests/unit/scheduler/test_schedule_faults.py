"""Each fault of a schedule is found."""

from dataclasses import replace

import pytest

from lorafusion_megatron.scheduler.validate import InvalidScheduleError, validate_schedule
from lorafusion_megatron.types import Microbatch, Schedule, StepEnd
from tests.unit.scheduler.instances import batches

JOBS = batches([[[4, 3], [5]], [[2]]])
A1, A2, B1 = JOBS[0][0].samples, JOBS[0][1].samples, JOBS[1][0].samples


def stream(*parts: tuple) -> tuple[Microbatch, ...]:  # type: ignore[type-arg]
    return tuple(Microbatch(samples=part) for part in parts)


def end(job: int, step: int, position: int) -> StepEnd:
    return StepEnd(job=job, step=step, position=position)


GOOD = Schedule(
    replicas=(stream((*A1, *B1), (), A2),),
    step_ends=(end(0, 1, 0), end(1, 1, 0), end(0, 2, 2)),
    distance=2,
    token_capacity=10,
    padding_multiple=1,
)


def test_a_good_schedule_passes() -> None:
    validate_schedule(GOOD, JOBS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": (stream((*A1, *B1), (), A2), stream((), ()))}, "replicas hold"),
        ({"replicas": (stream((*A1, *B1), (), ()),)}, "1 of 4 samples are missing"),
        ({"replicas": (stream((*A1, *B1), B1, A2),)}, "came before"),
        ({"replicas": (stream((*A1[::-1], *B1), (), A2),)}, "not in the order"),
        ({"replicas": (stream((A1[0], *B1), (), (A1[1], *A2)),)}, "two steps of one job"),
        ({"token_capacity": 8}, "9 padded tokens exceed the capacity 8"),
        ({"padding_multiple": 8}, "16 padded tokens exceed the capacity 10"),
        ({"distance": 3}, "job 0 step 2 starts at 2, before 3"),
        ({"step_ends": (end(0, 1, 0), end(1, 1, 0))}, "step ends are not"),
        ({"step_ends": (end(1, 1, 0), end(0, 1, 0), end(0, 2, 2))}, "not ordered"),
        ({"step_ends": (end(0, 1, 0), end(1, 1, 1), end(0, 2, 2))}, "job 1 step 1 ends at 0, not at 1"),
    ],
)
def test_each_fault_is_named(change: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InvalidScheduleError, match=message):
        validate_schedule(replace(GOOD, **change), JOBS)


def test_steps_must_follow_each_other() -> None:
    jobs = [[JOBS[0][0], replace(JOBS[0][1], step=3, samples=())], JOBS[1]]
    schedule = replace(
        GOOD, replicas=(stream((*A1, *B1), (), ()),), step_ends=(end(0, 1, 0), end(1, 1, 0), end(0, 3, 2))
    )
    with pytest.raises(InvalidScheduleError, match="step 3 follows step 1"):
        validate_schedule(schedule, jobs)
