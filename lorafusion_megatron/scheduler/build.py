"""Builds the schedule of a window from the jobs' global batches."""

from collections.abc import Sequence

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.blocks import in_turn_rows, sequential_rows
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.rows import Row, find_step_ends, to_streams, whole_groups
from lorafusion_megatron.scheduler.stagger import staggered_rows
from lorafusion_megatron.scheduler.validate import validate_schedule
from lorafusion_megatron.scheduler.weights import bottleneck_weights
from lorafusion_megatron.types import GlobalBatch, Schedule, padded

__all__ = ["PlanOptions", "build_schedule"]


def build_schedule(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions) -> Schedule:
    """Plan a window: the order of all microbatches on every replica and where the optimizer steps fall.

    Args:
        batches: per job its global batches of this window, in step order; a job may have none.
        options: capacity, pipeline and kind of schedule.

    Returns:
        A validated schedule; the same input gives the same schedule on any machine.

    Raises:
        UserError: no global batch at all, or a sample that no microbatch can hold.
    """
    batches = [job for job in batches if job]
    check_input(batches, options)
    rows = _plan_rows(batches, options)
    rows = whole_groups(rows, options.pipeline.accepted_count(len(rows)), options.replicas)
    schedule = Schedule(
        replicas=to_streams(rows, options.replicas),
        step_ends=find_step_ends(rows),
        distance=options.pipeline.distance(),
        token_capacity=options.token_capacity,
        padding_multiple=options.padding_multiple,
    )
    validate_schedule(schedule, batches)
    return schedule


def _plan_rows(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions) -> list[Row]:
    samples = [sample for job in batches for batch in job for sample in batch.samples]
    weights = bottleneck_weights(
        options.cost_model, options.chunk_loads, options.stages, samples, options.padding_multiple
    )
    if options.schedule == "staggered":
        return staggered_rows(batches, options, weights)
    plan = sequential_rows if options.schedule == "sequential" else in_turn_rows
    return plan(batches, options, weights)


def check_input(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions) -> None:
    """Raise where a window can't be planned."""
    if not batches:
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
