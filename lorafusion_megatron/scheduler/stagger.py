"""The staggered schedule: the candidate with the shortest predicted time, smoothed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile

from lorafusion_megatron.scheduler.blocks import grouped_rows, in_turn_rows
from lorafusion_megatron.scheduler.flow import LEAST_TARGET, FlowLimits, flow_rows
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.predict import lost_share, predict_seconds, simulated_seconds
from lorafusion_megatron.scheduler.rows import Row
from lorafusion_megatron.scheduler.settle import settle_rows
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
SLACK = 1.03
"""Time of the microbatches over that of their samples alone; above it padding, short microbatches or replicas that wait
for one another cost enough to try others."""
LARGE_BATCH = 1024
"""Samples of a global batch, per replica, from which a flow's borders cost nothing and packing it by itself takes long:
the time of best fit decreasing grows with the square."""
TRIAL_SAMPLES = 1024
"""Candidates are compared on the first steps of the window, up to about this many samples a replica."""


@dataclass(frozen=True)
class _Candidate:
    split: float
    follow: bool
    least: float = LEAST_TARGET


def staggered_rows(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights) -> list[Row]:
    """Plan all jobs together so that every stage stays busy.

    Full microbatches of equal time are tried first. Where they leave bubbles, because a job's next step waits for
    the pipeline, smaller microbatches are tried on a part of the window, and the paper's grouped schedule; the one
    with the shortest predicted time is taken. What comes out is not predicted to take longer, beyond `WORTH`, than
    the jobs' global batches in turn.

    Args:
        batches: per job its global batches in step order.
        options: capacity and pipeline.
        weights: predicted time.
    """
    first = _Candidate(1.0, False)
    rows = _flow(first, batches, options, weights)
    if options.stages > 1 and lost_share(rows, options, weights) > ENOUGH:
        best = _best_candidate(_first_steps(batches, TRIAL_SAMPLES * options.replicas), first, options, weights)
        if best is None:
            rows = grouped_rows(batches, options, weights)
        elif best != first:
            rows = _flow(best, batches, options, weights)
    rows = _no_slower_than_others(rows, batches, options, weights)
    if not options.smooth or options.stages == 1:
        return rows

    def repack(split: float, least: float) -> list[Row]:
        return _flow(_Candidate(split, False, least), batches, options, weights)

    return settle_rows(rows, batches, options, weights, repack)


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


def _no_slower_than_others(
    rows: list[Row], batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights
) -> list[Row]:
    """These rows, or simpler ones where they take less time; global batches of thousands are left as they are.

    A flow wastes some where the samples of a position are too few to be spread evenly over many replicas, and where a
    sample's padding is longer than itself, which its target does not know.
    """
    if max(len(batch.samples) for job in batches for batch in job) > LARGE_BATCH * options.replicas:
        return rows
    wasteful = _slack(rows, options, weights) > SLACK

    def seconds_of(rows: list[Row]) -> float:
        # Half-empty positions wait in ways that the quick prediction does not know.
        return simulated_seconds(rows, options) if wasteful else predict_seconds(rows, options, weights)

    best = seconds_of(rows)
    packing = options if wasteful else replace(options, solver_seconds=0.0)
    others = [in_turn_rows(batches, packing, weights)]
    if wasteful:
        others.append(flow_rows(batches, _full_limits(batches, options, weights)))
        others.append(grouped_rows(batches, packing, weights))
    for other in others:
        seconds = seconds_of(other)
        if seconds < WORTH * best:
            rows, best = other, seconds
    return rows


def _slack(rows: Sequence[Row], options: PlanOptions, weights: Weights) -> float:
    """Time of the positions, in which each replica waits for the slowest, over the samples' own without padding."""
    taken = sum(max(map(weights.part, row.parts)) for row in rows) * options.replicas
    samples = [sample.tokens for row in rows for part in row.parts for sample in part]
    fixed = weights.fixed * sum(samples) / options.token_capacity
    own = sum(map(weights.sample, samples)) + fixed
    return taken / own if own else 1.0


def _flow(
    candidate: _Candidate, batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights
) -> list[Row]:
    return flow_rows(batches, _limits(candidate, batches, options, weights))


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
        least=candidate.least,
        follow=candidate.follow,
    )


def _full_limits(batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, weights: Weights) -> FlowLimits:
    """Target time: that of a microbatch which is full, its padding included."""
    lengths = [sample.tokens for job in batches for batch in job for sample in batch.samples]
    squares = options.token_capacity * sum(n * n for n in lengths) // max(1, sum(lengths))
    target = weights.variable(options.token_capacity, squares)
    return replace(_limits(_Candidate(1.0, False), batches, options, weights), target=target)


def _first_steps(batches: Sequence[Sequence[GlobalBatch]], samples: int) -> list[list[GlobalBatch]]:
    """Equally many steps of each job, as many as hold about ``samples`` samples; at least 4."""
    longest = max(map(len, batches))
    per_turn = [sum(len(job[turn].samples) for job in batches if turn < len(job)) for turn in range(longest)]
    turns = max(4, sum(1 for _ in takewhile(lambda total: total <= samples, accumulate(per_turn))))
    return [list(job[:turns]) for job in batches]
