"""Who trains the jobs how: this package with each part switched on in turn, and the ways of others."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ...scheduler.build import PlanOptions, build_schedule
from ...types import GlobalBatch, Microbatch, Sample, Schedule, StepEnd
from .workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train the workload."""

    name: str
    adapters: str
    """none | eager (plain PyTorch) | fused (this package's kernels)"""
    order: str
    """sequential | round_robin | staggered"""
    capacity: int
    """Most tokens of a microbatch; a longer sample has one to itself. 0: one sample a microbatch."""
    baseline_of: str = ""
    """Baselines run at several microbatch sizes; the best of those of one name counts."""

    @property
    def flush(self) -> bool:
        """Whether the pipeline runs empty at every optimizer step."""
        return self.order == "sequential"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The microbatches of a variant."""

    schedule: Schedule
    padded_tokens: int
    """Rows with padding."""
    noops: int = field(default=0)


def variants(capacity: int, sizes: Sequence[int]) -> list[Variant]:
    """Everything that is measured.

    Args:
        capacity: most tokens of a microbatch.
        sizes: microbatch sizes at which the baselines are tried.
    """
    out = [
        Variant(
            name=f"sequential {_size(size)}", adapters="eager", order="sequential", capacity=size,
            baseline_of="sequential",
        )
        for size in sizes
    ]  # fmt: skip
    out += [
        Variant(
            name=f"round robin {_size(size)}", adapters="eager", order="round_robin", capacity=size,
            baseline_of="round robin",
        )
        for size in sizes
        if size >= capacity // 2
    ]  # fmt: skip
    out += [
        Variant(name="kernels only", adapters="fused", order="sequential", capacity=capacity),
        Variant(name="schedule only", adapters="eager", order="staggered", capacity=capacity),
        Variant(name="both", adapters="fused", order="staggered", capacity=capacity),
        Variant(name="no adapters", adapters="none", order="staggered", capacity=capacity),
    ]
    return out


def _size(size: int) -> str:
    return f"{size}" if size else "one sample"


def make_plan(variant: Variant, workload: Workload, options: PlanOptions) -> Plan:
    """The variant's schedule of a workload.

    Args:
        variant: what to plan.
        workload: its global batches.
        options: for this package's planner; ``padding_multiple`` is the tile of its kernels.

    Note: "no adapters" runs the very microbatches of "both", the padding to tiles included. Baselines pack first-fit
        decreasing within a global batch, without padding.
    """
    if variant.order == "staggered":
        multiple = 1 if variant.adapters == "eager" else options.padding_multiple
        schedule = build_schedule(workload.batches, replace(options, padding_multiple=multiple))
    else:
        schedule = _in_turn(workload.batches, variant, options)
    microbatches = schedule.replicas[0]
    return Plan(
        schedule=schedule,
        padded_tokens=sum(m.padded_tokens(schedule.padding_multiple) for m in microbatches),
        noops=sum(m.is_noop for m in microbatches),
    )


def _in_turn(batches: Sequence[Sequence[GlobalBatch]], variant: Variant, options: PlanOptions) -> Schedule:
    """One job after another, or one global batch of each job in turn."""
    if variant.order == "sequential":
        order = [batch for job in batches for batch in job]
    else:
        order = [job[step] for step in range(max(map(len, batches))) for job in batches if step < len(job)]
    stream: list[Microbatch] = []
    ends: list[StepEnd] = []
    last: dict[int, int] = {}
    for batch in order:
        if not variant.flush and batch.job in last:
            gap = options.pipeline.distance() - (len(stream) - last[batch.job])
            stream += [Microbatch()] * max(0, gap)
        stream += [Microbatch(samples=packed) for packed in _first_fit(batch.samples, variant.capacity)]
        last[batch.job] = len(stream) - 1
        ends.append(StepEnd(job=batch.job, step=batch.step, position=len(stream) - 1))
    return Schedule(
        replicas=(tuple(stream),),
        step_ends=tuple(ends),
        distance=options.pipeline.distance(),
        token_capacity=max(m.padded_tokens(1) for m in stream),
        padding_multiple=options.padding_multiple if variant.adapters == "fused" else 1,
    )


def _first_fit(samples: Sequence[Sample], capacity: int) -> list[tuple[Sample, ...]]:
    bins: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: -s.tokens):
        room = (b for b in bins if sum(s.tokens for s in b) + sample.tokens <= capacity)
        fitting = next(room, None)
        if fitting is None:
            bins.append([sample])
        else:
            fitting.append(sample)
    return [tuple(sorted(b, key=lambda s: s.position)) for b in bins]
