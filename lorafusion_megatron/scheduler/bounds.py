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

    ``1 - mean(busy) / max over jobs of sum over its steps of step_seconds``: a job's steps follow one another on
    stage 0 (`step_seconds`), so the sum bounds the whole from below; idle is what the stages' work leaves of it.

    Args:
        batches: per job its global batches.
        options: pipeline, replicas and cost model.
        busy: per stage the seconds of work of the plan.

    Returns:
        0 where the dependencies leave room for a full pipeline.
    """
    chain = max((sum(step_seconds(batch, options) for batch in job) for job in batches), default=0.0)
    # Where a stage has more work than that, the dependencies are not what limits.
    return 1 - sum(busy) / (len(busy) * chain) if chain > max(busy) else 0.0


def step_seconds(batch: GlobalBatch, options: PlanOptions) -> float:
    """Least time from the start of a step on stage 0 to the start of the job's next one there.

    ``max(way(longest) + sum over the others of min(forward, backward) on the first chunk,
    max over stages s of work_s + way to s and back of the shortest)``, where ``way`` is forward and backward on every
    chunk.

    Proof. Let x be the longest sample, at position p. All of the step lies between its first forward on stage 0 and the
    next step's, which comes after its last backward there. Stage 0 runs the forwards of the first chunk in the order of
    positions, and so its backwards: what stands before p has its forward done when x starts, what stands after p has
    its backward to come when x is back, and what shares p's microbatch lengthens it on every chunk. Whatever the
    arrangement, each other sample adds at least the shorter of its two directions on the first chunk to the way of x.
    With several replicas the others may run beside x on another one and add nothing. The second term: stage s works on
    the whole step after the way there and before the way back of some sample.

    Args:
        batch: a global batch.
        options: pipeline, replicas and cost model.

    Returns:
        Seconds; 0 without a sample.
    """
    if not batch.samples:
        return 0.0
    cost, chunks, stages = options.cost_model, options.chunk_loads, options.stages
    lengths = sorted(sample.tokens for sample in batch.samples)

    def seconds(tokens: int, squares: int, chunk: StageLoad, backward: bool) -> float:
        return cost.seconds(Load(tokens=tokens, squares=squares), chunk, backward=backward)

    def way(tokens: int, upto: int) -> float:
        return sum(seconds(tokens, tokens**2, chunk, b) for chunk in chunks[:upto] for b in (False, True))

    def added(tokens: int, backward: bool) -> float:
        """What a sample adds to a microbatch of the longest on the first chunk, fixed costs left out."""
        longest = lengths[-1]
        alone = seconds(longest, longest**2, chunks[0], backward)
        return seconds(longest + tokens, longest**2 + tokens**2, chunks[0], backward) - alone

    beside = sum(min(added(n, False), added(n, True)) for n in lengths[:-1]) if options.replicas == 1 else 0.0
    rows = padded(sum(lengths), options.padding_multiple)
    total = Load(tokens=rows // options.replicas, squares=sum(n * n for n in lengths) // options.replicas)
    work = stage_work(cost, chunks, stages, total, 1)
    ways = [own + way(lengths[0], stage) for stage, own in enumerate(work)]
    return max(way(lengths[-1], len(chunks)) + beside, *ways)


def lemma_positions(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions) -> int:
    """Positions that a stream needs: each job's microbatches and ``distance - 1`` positions between its steps."""
    distance, slots = options.pipeline.distance(), options.replicas
    best = 1
    for job in batches:
        bins = [fewest_bins_bound([sample.tokens for sample in batch.samples], options.token_capacity) for batch in job]
        positions = sum(max(1, -(-count // slots)) for count in bins) + (distance - 1) * max(0, len(job) - 1)
        best = max(best, positions)
    return best
