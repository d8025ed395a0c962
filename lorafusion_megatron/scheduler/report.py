"""What a plan costs: microbatches, fill, no-ops, predicted time, bubbles and the bounds they are judged by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorafusion_megatron.scheduler.bounds import lemma_bound, lemma_positions, split_bound
from lorafusion_megatron.scheduler.cost import Load, load_of
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.packing import fewest_bins_bound
from lorafusion_megatron.scheduler.simulate import Timeline, simulate
from lorafusion_megatron.types import GlobalBatch, Schedule


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Figures of a schedule over all replicas."""

    microbatches: int
    """Microbatches with samples."""
    noops: int
    """Microbatches without."""
    fill: float
    """Padded tokens over the capacity of the microbatches with samples."""
    predicted_seconds: float
    bubble_share: float
    """Idle share of the stages' time, 0 to 1; a replica that waits for a slower one idles."""
    split_bound: float
    """Idle share that the split of the layers leaves by itself."""
    lemma_bound: float
    """Idle share that the dependencies between a job's steps imply."""
    fewest_microbatches: int
    """``ceil(padded tokens / capacity)``."""
    packing_bound: int
    """Microbatches that the samples' lengths need even if all could be packed together (Martello and Toth's L2)."""
    lemma_positions: int
    """Positions that the dependency distance needs."""
    job_microbatches: Mapping[int, int] = field(default_factory=dict)
    """Job -> microbatches that hold a sample of it."""
    job_tokens: Mapping[int, int] = field(default_factory=dict)
    """Job -> tokens without padding."""


def simulate_schedule(schedule: Schedule, options: PlanOptions) -> Timeline:
    """Event times of a schedule; at each position the replicas wait for the slowest of them."""
    loads = [_slowest(position) for position in _loads(schedule)]
    return simulate(loads, options.pipeline, options.chunk_loads, options.cost_model)


def report_plan(
    schedule: Schedule, batches: Sequence[Sequence[GlobalBatch]], options: PlanOptions, timeline: Timeline | None = None
) -> PlanReport:
    """Judge a schedule.

    Args:
        schedule: the plan.
        batches: what it was made from.
        options: what it was made with.
        timeline: its simulation where that is known already.
    """
    timeline = timeline or simulate_schedule(schedule, options)
    positions = _loads(schedule)
    filled = [load for loads in positions for load in loads if load.tokens]
    tokens = sum(load.tokens for load in filled)
    total = Load(tokens=tokens, squares=sum(load.squares for load in filled))
    # A replica that waits for a slower one at a position is idle: scale the simulated work down to the mean.
    share = _mean_share(positions, options)
    busy = [seconds * share for seconds in timeline.busy]
    lengths = [sample.tokens for job in batches for batch in job for sample in batch.samples]
    job_microbatches: dict[int, int] = {}
    job_tokens: dict[int, int] = {}
    for stream in schedule.replicas:
        for microbatch in stream:
            for job in {sample.job for sample in microbatch.samples}:
                job_microbatches[job] = job_microbatches.get(job, 0) + 1
            for sample in microbatch.samples:
                job_tokens[sample.job] = job_tokens.get(sample.job, 0) + sample.tokens
    stage_seconds = timeline.seconds * options.stages
    return PlanReport(
        microbatches=len(filled),
        noops=schedule.num_microbatches * len(schedule.replicas) - len(filled),
        fill=tokens / max(1, len(filled) * schedule.token_capacity),
        predicted_seconds=timeline.seconds,
        bubble_share=1 - sum(busy) / stage_seconds if stage_seconds else 0.0,
        split_bound=split_bound(options.cost_model, options.chunk_loads, options.stages, total, len(filled)),
        lemma_bound=lemma_bound(batches, options, busy),
        fewest_microbatches=-(-tokens // schedule.token_capacity),
        packing_bound=fewest_bins_bound(lengths, schedule.token_capacity),
        lemma_positions=lemma_positions(batches, options),
        job_microbatches=dict(sorted(job_microbatches.items())),
        job_tokens=dict(sorted(job_tokens.items())),
    )


def combine_reports(reports: Sequence[PlanReport]) -> PlanReport:
    """The figures of windows that run one after another; shares are weighted by predicted time."""
    seconds = sum(report.predicted_seconds for report in reports)
    microbatches = sum(report.microbatches for report in reports)

    def mean(share: str) -> float:
        total = sum(getattr(report, share) * report.predicted_seconds for report in reports)
        return total / seconds if seconds else 0.0

    def per_job(counts: str) -> dict[int, int]:
        out: dict[int, int] = {}
        for report in reports:
            for job, count in getattr(report, counts).items():
                out[job] = out.get(job, 0) + count
        return dict(sorted(out.items()))

    return PlanReport(
        microbatches=microbatches,
        noops=sum(report.noops for report in reports),
        fill=sum(report.fill * report.microbatches for report in reports) / max(1, microbatches),
        predicted_seconds=seconds,
        bubble_share=mean("bubble_share"),
        split_bound=mean("split_bound"),
        lemma_bound=mean("lemma_bound"),
        fewest_microbatches=sum(report.fewest_microbatches for report in reports),
        packing_bound=sum(report.packing_bound for report in reports),
        lemma_positions=sum(report.lemma_positions for report in reports),
        job_microbatches=per_job("job_microbatches"),
        job_tokens=per_job("job_tokens"),
    )


def _loads(schedule: Schedule) -> list[list[Load]]:
    """Per position the features of each replica's microbatch."""
    multiple = schedule.padding_multiple
    return [
        [load_of(stream[position], multiple) for stream in schedule.replicas]
        for position in range(schedule.num_microbatches)
    ]


def _slowest(loads: Sequence[Load]) -> Load:
    return max(loads, key=lambda load: (load.tokens, load.squares))


def _mean_share(positions: Sequence[Sequence[Load]], options: PlanOptions) -> float:
    """Mean over the replicas of their work as a share of the slowest replica's at each position."""
    cost, chunks = options.cost_model, options.chunk_loads

    def seconds(load: Load) -> float:
        return sum(cost.seconds(load, chunk, backward=b) for chunk in set(chunks) for b in (False, True) if load.tokens)

    done = sum(map(seconds, (load for loads in positions for load in loads)))
    slowest = sum(seconds(_slowest(loads)) * len(loads) for loads in positions)
    return done / slowest if slowest else 1.0
