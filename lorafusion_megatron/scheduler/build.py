"""Builds the schedule of a window from the jobs' global batches."""

from collections import deque
from collections.abc import Sequence

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.dependency import accepted_count, dependency_distance
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.packing import best_fit_decreasing
from lorafusion_megatron.scheduler.validate import validate_schedule
from lorafusion_megatron.types import GlobalBatch, Microbatch, Sample, Schedule, StepEnd, padded

__all__ = ["PlanOptions", "build_schedule"]

Row = tuple[tuple[Sample, ...], ...]


def build_schedule(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions) -> Schedule:
    """Plan a window: the order of all microbatches on every replica and where the optimizer steps fall.

    Args:
        batches: per job its global batches of this window, in step order.
        options: capacity, pipeline and kind of schedule.

    Returns:
        A validated schedule; the same input gives the same schedule.

    Raises:
        UserError: no job, or a sample that no microbatch can hold.
    """
    _check_input(batches, options)
    distance = dependency_distance(options.stages, options.virtual_stages)
    rows, ends = _in_turn(batches, options, distance)
    while len(rows) < accepted_count(len(rows), options.stages, options.virtual_stages):
        rows.append(((),) * options.replicas)
    schedule = Schedule(
        replicas=tuple(tuple(Microbatch(samples=row[replica]) for row in rows) for replica in range(options.replicas)),
        step_ends=tuple(sorted(ends, key=lambda end: (end.position, end.job))),
        distance=distance,
        token_capacity=options.token_capacity,
        padding_multiple=options.padding_multiple,
    )
    validate_schedule(schedule, batches)
    return schedule


def _check_input(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions) -> None:
    if not any(batches):
        raise UserError("no global batch to plan", rule="a plan needs at least one job", remedy="add one", key="jobs")
    for job in batches:
        for batch in job:
            longest = max((sample.tokens for sample in batch.samples), default=0)
            if padded(longest, options.padding_multiple) > options.token_capacity:
                raise UserError(
                    f"a sample of {longest} tokens (job {batch.job}, step {batch.step})",
                    rule=f"a microbatch holds {options.token_capacity} tokens in multiples of "
                    f"{options.padding_multiple}",
                    remedy="raise runtime.token_capacity or lower the job's max_length",
                    key="runtime.token_capacity",
                )


def _rows(batch: GlobalBatch, options: PlanOptions) -> deque[Row]:
    """Positions of one global batch packed by itself, ``replicas`` microbatches each."""
    bins = best_fit_decreasing(batch.samples, options.token_capacity, options.padding_multiple)
    packed = [tuple(sorted(b.samples, key=lambda s: s.position)) for b in sorted(bins, key=lambda b: -b.tokens)]
    packed += [()] * (-len(packed) % options.replicas)
    step = options.replicas
    return deque(tuple(packed[i : i + step]) for i in range(0, len(packed), step))


def _in_turn(
    batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, distance: int
) -> tuple[list[Row], list[StepEnd]]:
    """The jobs' microbatches in turn (or job after job), with no-ops where nothing may start yet."""
    queues = [deque(job) for job in batches if job]
    current: list[deque[Row]] = [deque() for _ in queues]
    free = [0] * len(queues)
    rows: list[Row] = []
    ends: list[StepEnd] = []
    noop: Row = ((),) * options.replicas
    turn = 0
    while any(queues):
        for offset in range(len(queues)):
            index = (turn + offset) % len(queues)
            if queues[index] and (current[index] or free[index] <= len(rows)):
                break
            if options.schedule == "sequential" and queues[index]:
                index = -1
                break
        else:
            index = -1
        if index < 0:
            rows.append(noop)
            continue
        batch = queues[index][0]
        if not current[index]:
            current[index] = _rows(batch, options) or deque([noop])
        rows.append(current[index].popleft())
        if not current[index]:
            queues[index].popleft()
            ends.append(StepEnd(job=batch.job, step=batch.step, position=len(rows) - 1))
            free[index] = len(rows) - 1 + distance
            if options.schedule == "sequential":
                free = [max(value, free[index]) for value in free]
        if options.schedule != "sequential" or not queues[index]:
            turn = index + 1
    return rows, ends
