"""The staggered schedule: the candidate with the shortest predicted time, smoothed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, takewhile

from lorafusion_megatron.scheduler.anneal import anneal_rows
from lorafusion_megatron.scheduler.blocks import grouped_rows
from lorafusion_megatron.scheduler.cost import Load
from lorafusion_megatron.scheduler.flow import FlowLimits, flow_rows
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.packing import padded_tokens
from lorafusion_megatron.scheduler.refine import refine_rows
from lorafusion_megatron.scheduler.rows import Row, Samples
from lorafusion_megatron.scheduler.simulate import simulate
from lorafusion_megatron.scheduler.smooth import smooth_rows
from lorafusion_megatron.scheduler.waits import waiting_time, window_width
from lorafusion_megatron.scheduler.weights import Weights
from lorafusion_megatron.types import GlobalBatch

ROOM = 1.005
"""Fill 0.5 % less than full: the last samples of a microbatch then meet the target, and neighbours are alike."""
WORTH = 0.99
"""Smaller microbatches must take this share of the time of full ones, or less, to be taken: fewer are simpler."""
SPLITS = (1.0, 1.5, 2.2, 3.2)
"""Microbatches, as multiples of the fewest, that are tried where full ones leave bubbles."""
ENOUGH = 0.015
"""Idle share, beside filling and draining the pipeline, at which full microbatches are taken without a search."""
LEVEL_FROM = 0.01
"""Idle share from which samples and positions are moved: below, there is little to gain."""
ANNEAL_FROM = 0.02
"""Idle share, beside filling and draining, from which the stream is annealed: about as long as all the rest takes."""
FEWER_FROM = 0.1
"""Idle share from which fewer, longer microbatches are annealed as well: before it they are the worse ones."""
FEWER = 1.5
"""Their number as a multiple of the fewest."""
MOST_THRESHOLD = 0.2
"""Of the first threshold of annealing, which is twice the idle share: a better stream bears less disorder."""
MOST_ROUNDS = 4000
"""Rounds of annealing; with twice as many the idle share falls by 0.3 points at most, *measured*."""
SAMPLE_ROUNDS = 10_000_000
"""Samples times rounds: the time of a large window grows with its samples alone."""
MOST_JOBS = 64
"""With more jobs there is always one to fill a position, and the arrays of annealing grow with their number."""
TRIAL_SAMPLES = 1024
"""Candidates are compared on the first steps of the window, up to about this many samples a replica."""


@dataclass(frozen=True)
class _Candidate:
    split: float
    follow: bool


def staggered_rows(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights) -> list[Row]:
    """Plan all jobs together so that every stage stays busy.

    Full microbatches of equal time are tried first. Where they leave bubbles, because a job's next step waits for
    the pipeline, smaller microbatches are tried on a part of the window, and the paper's grouped schedule; the one
    with the shortest predicted time is taken.

    Args:
        batches: per job its global batches in step order.
        options: capacity and pipeline.
        weights: predicted time.
    """

    first = _Candidate(1.0, False)
    rows = _flow(first, batches, options, weights)
    if options.stages > 1 and _lost_share(rows, options, weights) > ENOUGH:
        best = _best_candidate(_first_steps(batches, TRIAL_SAMPLES * options.replicas), first, options, weights)
        if best is None:
            rows = grouped_rows(batches, options, weights)
        elif best != first:
            rows = _flow(best, batches, options, weights)
    if not options.smooth or options.stages == 1:
        return rows
    # Positions that were moved may let samples move again, which is worth its time where much is lost.
    for least in (LEVEL_FROM, ENOUGH, ENOUGH):
        if _lost_share(rows, options, weights) <= least:
            break
        rows = level_rows(rows, options, weights)
        if _lost_share(rows, options, weights) > FEWER_FROM and _can_anneal(batches, options):
            break
    if _lost_share(rows, options, weights) > ANNEAL_FROM and _can_anneal(batches, options):
        return _annealed(rows, batches, options, weights)
    return rows


def _can_anneal(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions) -> bool:
    """Whether `anneal_rows` covers the case: 1F1B on one replica, few jobs, no step without a sample."""
    plain = options.virtual_stages == 1 and options.replicas == 1
    return plain and len(batches) <= MOST_JOBS and all(batch.samples for job in batches for batch in job)


def _annealed(
    rows: list[Row], batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights
) -> list[Row]:
    """The stream annealed, or one of fewer microbatches, or as it was: what the simulator prefers."""
    starts: list[Sequence[Row]] = [rows]
    lost = _lost_share(rows, options, weights)
    if lost > FEWER_FROM:
        starts.append(_flow(_Candidate(FEWER, False), batches, options, weights))
    samples = sum(len(batch.samples) for job in batches for batch in job)
    rounds = min(MOST_ROUNDS, 2 * samples, SAMPLE_ROUNDS // samples)
    found = []
    for start in starts:
        annealed = anneal_rows(
            start,
            weights,
            capacity=options.token_capacity,
            distance=options.pipeline.distance(),
            width=window_width(options.stages),
            rounds=max(1, rounds),
            threshold=min(MOST_THRESHOLD, 2 * lost),
        )
        found.append(annealed)
    best = min(found, key=lambda stream: predict_seconds(stream, options, weights))
    return min(rows, level_rows(best, options, weights), key=lambda stream: _simulated_seconds(stream, options))


def _best_candidate(
    trial: Sequence[Sequence[GlobalBatch]], first: _Candidate, options: PlanOptions, weights: Weights
) -> _Candidate | None:
    """The candidate with the shortest predicted time of a part of the window; None: the grouped schedule."""
    seconds: dict[_Candidate | None, float] = {}
    for split in SPLITS:
        tried = [_Candidate(split, follow) for follow in (False, True)]
        for candidate in tried:
            seconds[candidate] = predict_seconds(_flow(candidate, trial, options, weights), options, weights)
        if min(seconds[candidate] for candidate in tried) > min(seconds.values()):
            # Still smaller microbatches only add fixed costs.
            break
    grouped = grouped_rows(trial, replace(options, solver_seconds=0.0), weights)
    seconds[None] = predict_seconds(grouped, options, weights)
    best = min(seconds, key=lambda candidate: seconds[candidate])
    return best if seconds[best] < WORTH * seconds[first] else first


def _flow(
    candidate: _Candidate, batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights
) -> list[Row]:
    return flow_rows(batches, _limits(candidate, batches, options, weights))


def level_rows(rows: Sequence[Row], options: PlanOptions, weights: Weights) -> list[Row]:
    """Bring neighbours closer in time: move samples, then whole positions."""
    distance, width = options.pipeline.distance(), window_width(options.stages)
    refined = refine_rows(rows, weights, capacity=options.token_capacity, distance=distance, width=width)
    return smooth_rows(refined, weights, distance=distance, width=width)


def _limits(
    candidate: _Candidate, batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights
) -> FlowLimits:
    """Target time: the window's whole time over the wanted number of microbatches."""
    samples = [sample for job in batches for batch in job for sample in batch.samples]
    tokens = sum(sample.tokens for sample in samples)
    wanted = max(1.0, ROOM * candidate.split * tokens / options.token_capacity)
    return FlowLimits(
        capacity=options.token_capacity,
        replicas=options.replicas,
        distance=options.pipeline.distance(),
        weights=weights,
        target=max(1e-12, sum(weights.sample(sample.tokens) for sample in samples) / wanted),
        follow=candidate.follow,
    )


def _first_steps(batches: Sequence[Sequence[GlobalBatch]], samples: int) -> list[list[GlobalBatch]]:
    """Equally many steps of each job, as many as hold about ``samples`` samples; at least 4."""
    longest = max(map(len, batches))
    per_turn = [sum(len(job[turn].samples) for job in batches if turn < len(job)) for turn in range(longest)]
    turns = max(4, sum(1 for _ in takewhile(lambda total: total <= samples, accumulate(per_turn))))
    return [list(job[:turns]) for job in batches]


def predict_seconds(rows: Sequence[Row], options: PlanOptions, weights: Weights) -> float:
    """Predicted time of a stream: from `waiting_time` under 1F1B, which takes no time, else from the simulator."""
    if options.virtual_stages == 1:
        times = [max(map(weights.part, row.parts)) for row in rows]
        width = window_width(options.stages)
        edge = [0.0] * (width - 1)
        return waiting_time([*edge, *times, *edge], width)
    return _simulated_seconds(rows, options)


def _simulated_seconds(rows: Sequence[Row], options: PlanOptions) -> float:
    loads = [max(map(partial(_load, options), row.parts), key=lambda load: (load.tokens, load.squares)) for row in rows]
    return simulate(loads, options.pipeline, options.chunk_loads, options.cost_model).seconds


def _load(options: PlanOptions, part: Samples) -> Load:
    return Load(tokens=padded_tokens(part, options.padding_multiple), squares=sum(sample.tokens**2 for sample in part))


def _lost_share(rows: Sequence[Row], options: PlanOptions, weights: Weights) -> float:
    """Share of the slowest stage's time that it idles, filling and draining left out."""
    seconds = predict_seconds(rows, options, weights)
    times = [max(map(weights.part, row.parts)) for row in rows]
    edges = sum(times) / max(1, len(times)) * (options.stages - 1) / options.virtual_stages
    return max(0.0, 1 - (sum(times) + edges) / seconds) if seconds else 0.0
