"""Lower bounds: what no schedule can do better than, so that a plan's bubbles can be judged."""

from collections.abc import Sequence

from lorafusion_megatron.scheduler.cost import CostModel, Load, StageLoad
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.packing import fewest_bins_bound
from lorafusion_megatron.types import GlobalBatch, padded


def split_bound(cost: CostModel, loads: Sequence[StageLoad], stages: int, total: Load, microbatches: int) -> float:
    """Idle share that the split of the layers leaves by itself: ``1 - mean / max`` of the stages' work.

    Args:
        cost: predicted rates.
        loads: per chunk what it holds.
        stages: pipeline stages.
        total: features of all samples together.
        microbatches: how many hold them, for the fixed costs.
    """
    work = stage_work(cost, loads, stages, total, microbatches)
    return 1 - sum(work) / (len(work) * max(work)) if max(work) else 0.0


def stage_work(cost: CostModel, loads: Sequence[StageLoad], stages: int, total: Load, microbatches: int) -> list[float]:
    """Per stage the seconds of forward and backward of ``total`` in ``microbatches`` pieces."""

    def chunk(load: StageLoad) -> float:
        fixed, per_token, per_square = cost.both(load)
        return microbatches * fixed + per_token * total.tokens + per_square * total.squares

    return [sum(map(chunk, loads[stage::stages])) for stage in range(stages)]


def lemma_bound(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, busy: Sequence[float]) -> float:
    """Idle share that the dependencies between a job's steps imply.

    A step's samples all run between the start of its first microbatch on stage 0 and the start of the job's next
    step there. That takes at least the way of the step's longest sample through all chunks and back, and on stage s
    the step's whole work after the way there and before the way back of its shortest sample. The sum over a job's
    steps bounds the whole; idle is what the stages' work leaves of it.

    Args:
        batches: per job its global batches.
        options: pipeline, replicas and cost model.
        busy: per stage the seconds of work of the plan.

    Returns:
        0 where the dependencies leave room for a full pipeline.
    """
    chain = max((sum(_step_seconds(batch, options) for batch in job) for job in batches), default=0.0)
    # Where a stage has more work than that, the dependencies are not what limits.
    return 1 - sum(busy) / (len(busy) * chain) if chain > max(busy) else 0.0


def _step_seconds(batch: GlobalBatch, options: PlanOptions) -> float:
    """Least time from the start of a step to the start of the job's next one."""
    if not batch.samples:
        return 0.0
    cost, chunks, stages = options.cost_model, options.chunk_loads, options.stages
    lengths = [sample.tokens for sample in batch.samples]

    def way(tokens: int, upto: int) -> float:
        load = Load(tokens=tokens, squares=tokens * tokens)
        return sum(
            cost.seconds(load, chunk, backward=backward) for chunk in chunks[:upto] for backward in (False, True)
        )

    rows = padded(sum(lengths), options.padding_multiple)
    total = Load(tokens=rows // options.replicas, squares=sum(n * n for n in lengths) // options.replicas)
    work = stage_work(cost, chunks, stages, total, 1)
    shortest = min(lengths)
    ways = [seconds + way(shortest, stage) for stage, seconds in enumerate(work)]
    return max(way(max(lengths), len(chunks)), *ways)


def lemma_positions(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions) -> int:
    """Positions that a stream needs: each job's microbatches and ``distance - 1`` positions between its steps."""
    distance, slots = options.pipeline.distance(), options.replicas
    best = 1
    for job in batches:
        bins = [fewest_bins_bound([sample.tokens for sample in batch.samples], options.token_capacity) for batch in job]
        positions = sum(max(1, -(-count // slots)) for count in bins) + (distance - 1) * max(0, len(job) - 1)
        best = max(best, positions)
    return best
