"""Checks that a schedule may run: raises on the first fault."""

from collections.abc import Iterator, Sequence

from lorafusion_megatron.types import GlobalBatch, Microbatch, Sample, Schedule


class InvalidScheduleError(ValueError):
    """A schedule that would train wrongly or not at all; a fault of the planner, never of the user."""


def validate_schedule(schedule: Schedule, batches: Sequence[Sequence[GlobalBatch]]) -> None:
    """Check that ``schedule`` runs ``batches`` exactly.

    Every sample once; token capacity; one step a job in a microbatch, jobs ascending, (step, position) ascending;
    equally many microbatches on all replicas; each step's end is the last position that holds a sample of it;
    a job's steps in order and at least ``schedule.distance`` apart.

    Args:
        schedule: what the planner made.
        batches: per job its global batches of this window, in step order.

    Raises:
        InvalidScheduleError: says where and what.
    """
    if len({len(stream) for stream in schedule.replicas}) != 1:
        raise InvalidScheduleError(f"replicas hold {[len(stream) for stream in schedule.replicas]} microbatches")
    wanted = {_key(sample): sample for job in batches for batch in job for sample in batch.samples}
    span: dict[tuple[int, int], tuple[int, int]] = {}
    seen = 0
    for replica, position, microbatch in _walk(schedule):
        where = f"replica {replica}, position {position}"
        _check_microbatch(microbatch, schedule, where)
        for sample in microbatch.samples:
            if wanted.pop(_key(sample), None) != sample:
                raise InvalidScheduleError(f"{where}: {sample} is not in the global batches, or came before")
            first, last = span.get((sample.job, sample.step), (position, position))
            span[sample.job, sample.step] = (min(first, position), max(last, position))
            seen += 1
    if wanted:
        raise InvalidScheduleError(f"{len(wanted)} of {seen + len(wanted)} samples are missing: {min(wanted)} …")
    _check_steps(schedule, batches, span)


def _key(sample: Sample) -> tuple[int, int, int]:
    return sample.job, sample.step, sample.position


def _walk(schedule: Schedule) -> Iterator[tuple[int, int, Microbatch]]:
    for replica, stream in enumerate(schedule.replicas):
        for position, microbatch in enumerate(stream):
            yield replica, position, microbatch


def _check_microbatch(microbatch: Microbatch, schedule: Schedule, where: str) -> None:
    keys = [_key(sample) for sample in microbatch.samples]
    if keys != sorted(keys):
        raise InvalidScheduleError(f"{where}: samples are not in the order (job, step, position): {keys}")
    pairs = {(job, step) for job, step, _ in keys}
    if len(pairs) != len({job for job, _ in pairs}):
        raise InvalidScheduleError(f"{where}: two steps of one job in a microbatch: {sorted(pairs)}")
    tokens = microbatch.padded_tokens(schedule.padding_multiple)
    if tokens > schedule.token_capacity:
        raise InvalidScheduleError(f"{where}: {tokens} padded tokens exceed the capacity {schedule.token_capacity}")


def _check_steps(
    schedule: Schedule, batches: Sequence[Sequence[GlobalBatch]], span: dict[tuple[int, int], tuple[int, int]]
) -> None:
    wanted = [(batch.job, batch.step) for job in batches for batch in job]
    ends = {(end.job, end.step): end.position for end in schedule.step_ends}
    if len(ends) != len(schedule.step_ends) or sorted(ends) != sorted(wanted):
        raise InvalidScheduleError("the step ends are not the (job, step) of the global batches, once each")
    order = [(end.position, end.job) for end in schedule.step_ends]
    if order != sorted(order):
        raise InvalidScheduleError("the step ends are not ordered by (position, job)")
    for job in batches:
        free = 0
        previous = None
        for batch in job:
            if previous is not None and batch.step != previous + 1:
                raise InvalidScheduleError(f"job {batch.job}: step {batch.step} follows step {previous}")
            previous = batch.step
            end = ends[batch.job, batch.step]
            first, last = span.get((batch.job, batch.step), (end, end))
            if end != last or not 0 <= end < schedule.num_microbatches:
                raise InvalidScheduleError(f"job {batch.job} step {batch.step} ends at {last}, not at {end}")
            if first < free:
                raise InvalidScheduleError(
                    f"job {batch.job} step {batch.step} starts at {first}, before {free} (distance {schedule.distance})"
                )
            free = end + schedule.distance
