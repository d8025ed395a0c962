"""Schedules made of blocks: a (group, step) is packed by itself and the blocks follow each other."""

from collections.abc import Sequence

from lorafusion_megatron.scheduler.dependency import repair_distance
from lorafusion_megatron.scheduler.exact import pack_exactly
from lorafusion_megatron.scheduler.grouping import fewest_groups_that_fill, head_tail_groups
from lorafusion_megatron.scheduler.merge import merge_rows
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.packing import best_fit_decreasing, rows_from_bins
from lorafusion_megatron.scheduler.rows import Row, noop_row
from lorafusion_megatron.scheduler.weights import Weights
from lorafusion_megatron.types import GlobalBatch

EXACT_SAMPLES = 64
"""Blocks of more samples than this are left to best fit decreasing: it is optimal there but for one in a hundred."""


def pack_block(
    batches: Sequence[GlobalBatch], options: PlanOptions, weights: Weights, *, merge: bool = False
) -> list[Row]:
    """Pack one step of each of several jobs into few positions.

    Greedy first; where the greedy packing may not be best and the block is small, exactly.

    Args:
        batches: at most one global batch of each job.
        options: capacity, replicas, time limit of the exact solver.
        weights: predicted time.
        merge: the emptiest microbatch will be merged with a neighbour, so it should be as empty as can be.

    Returns:
        Rows, slowest first; at least one, which is a no-op where no batch has a sample.
    """
    capacity, multiple = options.token_capacity, options.padding_multiple
    samples = [sample for batch in batches for sample in batch.samples]
    bins = best_fit_decreasing(samples, capacity, multiple)
    if options.solver_seconds > 0 and len(samples) <= EXACT_SAMPLES:
        bins = pack_exactly(bins, capacity, multiple, options.solver_seconds, empty_last=merge)[0]
    rows = rows_from_bins(bins, options.replicas, capacity, weights) or [noop_row(options.replicas)]
    empty = tuple((batch.job, batch.step) for batch in batches if not batch.samples)
    return [*rows[:-1], Row(rows[-1].parts, empty)]


def sequential_rows(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights) -> list[Row]:
    """One job after another, the pipeline drained after each global batch, as Megatron-LM trains.

    Args:
        batches: per job its global batches in step order.
        options: capacity and pipeline.
        weights: predicted time.
    """
    rows = [row for job in batches for batch in job for row in pack_block([batch], options, weights)]
    return repair_distance(rows, options.pipeline.distance(), options.replicas, barrier=True)


def in_turn_rows(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights) -> list[Row]:
    """The jobs' global batches in turn, each packed by itself, as mLoRA fills its pipeline.

    Args:
        batches: per job its global batches in step order.
        options: capacity and pipeline.
        weights: predicted time.
    """
    rows = [
        row
        for turn in range(max(map(len, batches)))
        for job in batches
        if turn < len(job)
        for row in pack_block([job[turn]], options, weights)
    ]
    return repair_distance(rows, options.pipeline.distance(), options.replicas)


def grouped_rows(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights) -> list[Row]:
    """The paper's schedule: groups of long and short jobs in turn, packed per (group, step), then merged and repaired.

    Args:
        batches: per job its global batches in step order.
        options: capacity and pipeline.
        weights: predicted time.
    """
    distance = options.pipeline.distance()
    samples = [[sample.tokens for batch in job for sample in batch.samples] for job in batches]
    means = [sum(lengths) / max(1, len(lengths)) for lengths in samples]
    slots = options.token_capacity * options.replicas
    work = [sum(lengths) / (slots * len(job)) for lengths, job in zip(samples, batches, strict=True)]
    groups = head_tail_groups(means, fewest_groups_that_fill(means, work, distance))
    rows = [
        row
        for turn in range(max(map(len, batches)))
        for group in groups
        if any(turn < len(batches[job]) for job in group)
        for row in pack_block(
            [batches[job][turn] for job in group if turn < len(batches[job])], options, weights, merge=True
        )
    ]
    merged = merge_rows(rows, options.token_capacity, options.padding_multiple, distance)
    return repair_distance(merged, distance, options.replicas)
