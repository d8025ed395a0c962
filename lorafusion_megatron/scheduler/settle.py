"""Brings a packed stream's neighbours closer in time: levelling first, annealing where much is lost."""

from collections.abc import Callable, Sequence

from lorafusion_megatron.scheduler.anneal import Cooling, anneal_rows
from lorafusion_megatron.scheduler.flow import LEAST_TARGET
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.predict import lost_share, predict_seconds, simulated_seconds
from lorafusion_megatron.scheduler.refine import refine_rows
from lorafusion_megatron.scheduler.rows import Row, noop_row
from lorafusion_megatron.scheduler.smooth import smooth_rows
from lorafusion_megatron.scheduler.waits import window_width
from lorafusion_megatron.scheduler.weights import Weights
from lorafusion_megatron.types import GlobalBatch

Repack = Callable[[float, float], list[Row]]
"""(microbatches wanted, as a multiple of the fewest, and `FlowLimits.least`) -> a stream."""

LEVEL_FROM = 0.01
"""Idle share from which samples and positions are moved: below, there is little to gain."""
LEVEL_AGAIN_FROM = 0.015
"""Idle share from which they are moved again."""
ANNEAL_FROM = 0.02
"""Idle share, beside filling and draining, from which the stream is annealed: about as long as all the rest takes."""
FEWER_FROM = 0.1
"""Idle share from which fewer, longer microbatches are annealed as well: before it they are the worse ones."""
MOST_THRESHOLD = 0.2
"""Of the first threshold of annealing, which is twice the idle share: a better stream bears less disorder."""
MOST_ROUNDS = 4000
"""Rounds of the short annealing."""
SAMPLE_ROUNDS = 10_000_000
"""Samples times rounds: the time of a large window grows with its samples alone."""
HOLDS = 0.03
"""Idle share, simulated and, filling and draining left out, predicted, above which the stream is annealed long, where
that was asked for."""
FEWER = 1.5
"""Their number as a multiple of the fewest."""
OTHERS = ((0.9, 0.5), (0.85, 0.95), (0.8, 0.95))
"""Other streams that are annealed a while: (microbatches wanted, as a share of the stream's, and `FlowLimits.least`).
Annealing keeps the number of positions, which alone makes up to half a point, *measured*."""
TRIAL_SHARE = 0.05
"""Share of the rounds in which the stream and the others are compared."""
TURNS = 2
NEARLY_HOLDS = 0.035
"""Idle share below which a stream that misses `HOLDS` gets a second turn: it gains about 0.1 points."""
LONG_ROUNDS = 34_000
"""Rounds of the long annealing: 1 ms each for 8,000 samples."""
EDGE = 32
"""Free positions at both ends: microbatches that grow and shrink there fill and drain the pipeline sooner, which saves
0.1 points of 1,500 positions, *measured*."""
LONG_FROM_SAMPLES = 2048
"""Samples of a window from which it gets all `LONG_ROUNDS`; a smaller one gets them in proportion."""
LONG_SAMPLE_ROUNDS = 300_000_000
"""Samples times rounds, as `SAMPLE_ROUNDS`."""
LONG_THRESHOLD = 3.0
"""First threshold of the long annealing in idle shares: many rounds bear a hotter start."""
LONG_MOST_THRESHOLD = 0.4
"""Of the first threshold of the long annealing."""
MOST_JOBS = 64
"""With more jobs there is always one to fill a position, and the arrays of annealing grow with their number."""


def settle_rows(
    rows: list[Row],
    batches: Sequence[Sequence[GlobalBatch]],
    options: PlanOptions,
    weights: Weights,
    repack: Repack,
) -> list[Row]:
    """Level a stream, and anneal it where that leaves much idle: shortly, and with high effort long if it misses 3 %.

    Args:
        rows: a valid stream.
        batches: per job its global batches in step order.
        options: capacity and pipeline.
        weights: predicted time.
        repack: packs the window anew.

    Returns:
        A valid stream that takes no longer.
    """
    # Positions that were moved may let samples move again, which is worth its time where much is lost.
    for least in (LEVEL_FROM, LEVEL_AGAIN_FROM, LEVEL_AGAIN_FROM):
        if lost_share(rows, options, weights) <= least:
            break
        rows = level_rows(rows, options, weights)
        if lost_share(rows, options, weights) > FEWER_FROM and can_anneal(batches, options):
            break
    if lost_share(rows, options, weights) > ANNEAL_FROM and can_anneal(batches, options):
        rows = _anneal_shortly(rows, options, weights, repack)
        misses = min(_idle_share(rows, options, weights), lost_share(rows, options, weights)) > HOLDS
        if options.effort == "high" and misses:
            rows = _anneal_long(rows, options, weights, repack)
    return rows


def can_anneal(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions) -> bool:
    """Whether `anneal_rows` covers the case: 1F1B on one replica, few jobs, no step without a sample."""
    plain = options.virtual_stages == 1 and options.replicas == 1
    return plain and len(batches) <= MOST_JOBS and all(batch.samples for job in batches for batch in job)


def level_rows(rows: Sequence[Row], options: PlanOptions, weights: Weights) -> list[Row]:
    """Bring neighbours closer in time: move samples, then whole positions."""
    distance, width = options.pipeline.distance(), window_width(options.stages)
    refined = refine_rows(rows, weights, capacity=options.token_capacity, distance=distance, width=width)
    return smooth_rows(refined, weights, distance=distance, width=width)


def _anneal_shortly(rows: list[Row], options: PlanOptions, weights: Weights, repack: Repack) -> list[Row]:
    """The stream annealed, or one of fewer microbatches, or as it was: what the simulator prefers."""
    lost = lost_share(rows, options, weights)
    starts = [rows, repack(FEWER, LEAST_TARGET)] if lost > FEWER_FROM else [rows]
    samples = _count_samples(rows)
    rounds = min(MOST_ROUNDS, 2 * samples, SAMPLE_ROUNDS // samples)
    cooling = Cooling(rounds=max(1, rounds), threshold=min(MOST_THRESHOLD, 2 * lost))
    found = [_anneal(start, options, weights, cooling) for start in starts]
    best = min(found, key=lambda stream: predict_seconds(stream, options, weights))
    return min(rows, level_rows(best, options, weights), key=lambda stream: simulated_seconds(stream, options))


def _anneal_long(rows: list[Row], options: PlanOptions, weights: Weights, repack: Repack) -> list[Row]:
    """The stream annealed long, or one of another number of positions, or as it was: what the simulator prefers."""
    samples = _count_samples(rows)
    rounds = min(LONG_ROUNDS, LONG_ROUNDS * samples // LONG_FROM_SAMPLES, LONG_SAMPLE_ROUNDS // samples)

    def anneal(start: list[Row], share: float) -> list[Row]:
        threshold = min(LONG_MOST_THRESHOLD, LONG_THRESHOLD * lost_share(start, options, weights))
        cooling = Cooling(
            rounds=max(1, int(share * rounds)), threshold=threshold, reach=6, borders_every=1, exchange=True
        )
        return _anneal(start, options, weights, cooling)

    tokens = sum(sample.tokens for row in rows for sample in row.parts[0])
    multiple = len(rows) * options.token_capacity / tokens
    starts = [rows, *(repack(share * multiple, least) for share, least in OTHERS)]
    tried = [anneal(start, TRIAL_SHARE) for start in starts]
    best = min(tried, key=lambda stream: predict_seconds(stream, options, weights))
    edge = [noop_row(1)] * EDGE
    for _ in range(TURNS):
        found = level_rows(_without_edges(anneal([*edge, *best, *edge], 1.0)), options, weights)
        best = min(best, found, key=lambda stream: simulated_seconds(stream, options))
        if not HOLDS < _idle_share(best, options, weights) < NEARLY_HOLDS:
            break
    return min(rows, best, key=lambda stream: simulated_seconds(stream, options))


def _without_edges(rows: list[Row]) -> list[Row]:
    """The stream from its first position with a sample to its last."""
    filled = [position for position, row in enumerate(rows) if not row.is_noop]
    return rows[filled[0] : filled[-1] + 1]


def _anneal(rows: Sequence[Row], options: PlanOptions, weights: Weights, cooling: Cooling) -> list[Row]:
    distance, width = options.pipeline.distance(), window_width(options.stages)
    return anneal_rows(rows, weights, capacity=options.token_capacity, distance=distance, width=width, cooling=cooling)


def _count_samples(rows: Sequence[Row]) -> int:
    return sum(len(part) for row in rows for part in row.parts)


def _idle_share(rows: Sequence[Row], options: PlanOptions, weights: Weights) -> float:
    """Simulated share of the slowest stage's time that it idles."""
    work = sum(max(map(weights.part, row.parts)) for row in rows)
    return 1 - work / simulated_seconds(rows, options)
