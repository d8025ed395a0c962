"""Runs the variants on one model in one process group, one after another and again, and keeps what each did."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from ...data.collate import collate
from ...lora.autograd import Backend
from ...lora.bank import AdapterShard
from ...lora.layout import TargetLinear
from ...lora.reference import TorchBackend
from ...mcore.batch import HostBatch, host_batch
from ...mcore.build import BuildOptions, build_chunks
from ...mcore.device_steps import make_steps
from ...mcore.inject import inject, taken_over
from ...mcore.parallel import Groups
from ...mcore.steps import StepRule
from ...mcore.stream import Span, StreamRunner, WindowResult
from ...scheduler.build import PlanOptions
from ...types import AdapterSpec, Microbatch, ModelSpec, Schedule, StepEnd, Topology
from ..garbage import settle
from ..prefetch import prefetch
from ..setup import linear_layouts
from .eager import EagerLora, EagerSteps, Factors, IdleSteps, eager_factors
from .profile import KernelTimes, profile_kernels
from .variants import Plan, Variant, make_plan
from .watch import Reading, Watch
from .workloads import Workload

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Every linear of a block, one A each: what Megatron's own LoRA has."""
RULE = StepRule(
    lr_at=lambda step: 1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_grad=1.0, max_bad_steps=1_000_000
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The model and its adapters."""

    spec: ModelSpec
    topology: Topology
    layers_per_chunk: tuple[int, ...]
    transformer_impl: str
    dtype: torch.dtype
    backend: Backend
    adapters: Mapping[int, AdapterSpec]


@dataclass(kw_only=True)
class Outcome:
    """What a variant did on one workload, over its repeats."""

    variant: Variant
    plan: Plan
    tokens: int
    seconds: list[float] = field(default_factory=list)
    bubbles: list[float] = field(default_factory=list)
    peak_bytes: tuple[int, ...] = ()
    """Per stage, the most memory that was allocated."""
    readings: tuple[Reading, ...] = ()
    """Per stage, clock and power of the last repeat, where they were watched."""
    spans: list[list[Span]] = field(default_factory=list)
    """Per stage, of the last repeat."""
    failure: str = ""

    @property
    def rate(self) -> float:
        """Tokens per second, without padding; the median of the repeats."""
        return self.tokens / statistics.median(self.seconds) if self.seconds else 0.0

    @property
    def bubble_share(self) -> float:
        """Idle share of the stages' time; the median of the repeats."""
        return statistics.median(self.bubbles) if self.bubbles else 0.0


class Bench:
    """One model with random weights, on which every variant runs. Every rank makes one.

    Args:
        setting: the model and its adapters.
        groups: this rank's groups.
        watching: whether each timed run's clock and power are read.
    """

    def __init__(self, setting: Setting, groups: Groups, *, watching: bool = False) -> None:
        self.setting, self.groups, self.watching = setting, groups, watching
        options = BuildOptions(
            dtype=setting.dtype,
            device=groups.device,
            layers_per_chunk=setting.layers_per_chunk,
            transformer_impl=setting.transformer_impl,
        )
        self.chunks = build_chunks(setting.spec, setting.topology, options)
        _randomize(self.chunks)
        self._targets = inject(
            self.chunks,
            linear_layouts(setting.spec, groups.tp_rank, groups.tp_size),
            backend=setting.backend,
            tp_rank=groups.tp_rank,
            tp_size=groups.tp_size,
        )
        self._modules = taken_over(self.chunks)
        self._steps = {
            "none": {job: IdleSteps(groups.device) for job in setting.adapters},
            "fused": self._fused(),
            "eager": self._eager(),
        }

    def run(
        self,
        workload: Workload,
        variants: Sequence[Variant],
        options: PlanOptions,
        *,
        repeats: int,
        baseline_tokens: int,
        tell: Callable[[str], None] = lambda text: None,
    ) -> list[Outcome]:
        """Measure every variant ``repeats`` times, in turn.

        Args:
            workload: what to train.
            variants: how.
            options: for this package's planner.
            repeats: timed runs of each.
            baseline_tokens: about how many tokens a flushed variant trains: its steps don't depend on each other.
            tell: told of every run as it ends, so that a benchmark that is cut off has said something.
        """
        outcomes = []
        for variant in variants:
            share = min(1.0, baseline_tokens / workload.tokens) if variant.flush else 1.0
            part = workload.first(max(1, round(share * max(map(len, workload.batches)))))
            outcomes.append(Outcome(variant=variant, plan=make_plan(variant, part, options), tokens=part.tokens))
        for outcome in outcomes:
            self._guarded(outcome, workload, _distinct(outcome.plan.schedule))
            tell(f"{workload.name}, {outcome.variant.name}: warm")
        for repeat in range(repeats):
            for outcome in outcomes:
                if not outcome.failure:
                    self._guarded(outcome, workload, None, keep_spans=repeat == repeats - 1)
                    latest = outcome.tokens / outcome.seconds[-1] if outcome.seconds else 0.0
                    tell(f"{workload.name}, {outcome.variant.name}: {latest:,.0f} tokens/s")
        return outcomes

    def profile(self, outcome: Outcome, workload: Workload) -> list[KernelTimes]:
        """The kernels of one more run of a variant that was measured, for each stage."""
        watched = replace(outcome, seconds=[], bubbles=[])  # slower for being watched: no run of the outcome's
        mine = profile_kernels(lambda: self._once(watched, workload, None, keep_spans=False))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self.groups.objects)
        return everyone

    def _guarded(
        self, outcome: Outcome, workload: Workload, warm_up: Schedule | None, *, keep_spans: bool = False
    ) -> None:
        """Run once; a variant that runs out of memory says so instead of ending the others."""
        try:
            self._once(outcome, workload, warm_up, keep_spans=keep_spans)
        except torch.OutOfMemoryError:
            if self.groups.pp_size > 1:
                raise  # the other stages wait for this one
            outcome.failure = "out of memory"
            self._clear()

    def _once(self, outcome: Outcome, workload: Workload, warm_up: Schedule | None, *, keep_spans: bool) -> None:
        self._choose(outcome.variant.adapters)
        schedule = warm_up or outcome.plan.schedule
        runner = StreamRunner(
            self.chunks,
            self._steps[outcome.variant.adapters],  # type: ignore[arg-type]
            on_applied=lambda job, step: None,
            on_report=lambda report: None,
        )
        noop = self._batch(Microbatch(), workload, schedule.padding_multiple).to(self.groups.device)[0]
        batches = [self._batch(m, workload, schedule.padding_multiple) for m in schedule.replicas[0]]
        self._rewind(outcome.variant.adapters)
        if self.groups.device.type == "cuda":
            if warm_up is None:
                settle()
            torch.cuda.reset_peak_memory_stats()
        with Watch(self.groups.device if self.watching and warm_up is None else None) as watch:
            dist.barrier(group=self.groups.objects)
            result = runner.run(
                schedule,
                lambda: prefetch(iter(batches), self.groups.device),
                noop=noop,
                flush=outcome.variant.flush and warm_up is None,
            )
        if warm_up is not None:
            self._clear()
            return
        self._record(outcome, result, watch.reading, keep_spans)

    def _record(self, outcome: Outcome, result: WindowResult, reading: Reading | None, keep_spans: bool) -> None:
        peak = torch.cuda.max_memory_allocated() if self.groups.device.type == "cuda" else 0
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (result, peak, reading), group=self.groups.objects)
        results = [r for r, _, _ in everyone]
        wall = max(r.stopped for r in results) - min(r.started for r in results)
        busy = sum(r.busy_seconds for r in results) / len(results)
        outcome.seconds.append(wall)
        outcome.bubbles.append(max(0.0, 1.0 - busy / wall))
        outcome.peak_bytes = tuple(p for _, p, _ in everyone)
        outcome.readings = tuple(r for _, _, r in everyone if r is not None)
        if keep_spans:
            first = min(r.started for r in results)
            outcome.spans = [[_shifted(span, first) for span in r.spans] for r in results]

    def _batch(self, microbatch: Microbatch, workload: Workload, multiple: int) -> HostBatch:
        jobs = {sample.job for sample in microbatch.samples}
        return host_batch(
            collate(microbatch, workload.rows, multiple),  # type: ignore[arg-type]
            seeds={job: self.setting.adapters[job].seed for job in jobs},
            slots={job: job for job in jobs},
            tile=self.setting.backend.tile if multiple % self.setting.backend.tile == 0 else 1,
            pinned=self.groups.device.type == "cuda",
        )

    def _choose(self, adapters: str) -> None:
        """Give every linear the class of a variant."""
        for module, base, fused in self._modules:
            module.__class__ = {"none": base, "fused": fused, "eager": _eager_class(base)}[adapters]

    def _rewind(self, adapters: str) -> None:
        """Let every job's optimizer steps count from 1 again."""
        for steps in self._steps[adapters].values():
            steps.applied = 0

    def _clear(self) -> None:
        """Forget gradients that a warm-up or a failure left."""
        for steps in self._steps["fused"].values():
            steps.shard.grad.zero_()
        for steps in self._steps["eager"].values():
            steps.optimizer.zero_grad(set_to_none=True)

    def _fused(self) -> dict[int, Any]:
        out = {}
        for job, adapter in self.setting.adapters.items():
            shard = AdapterShard(adapter, self._targets, dtype=self.setting.dtype)
            shard.master.normal_(std=0.02)
            shard.refresh()
            shard.attach(job)
            out[job] = make_steps(job, shard, RULE, self.groups, chunks=len(self.chunks))
        return out

    def _eager(self) -> dict[int, Any]:
        by_name = {target.adapters.name: target for target in self._targets}
        parameters: dict[int, list[torch.nn.Parameter]] = {job: [] for job in self.setting.adapters}
        for module, _, _ in self._modules:
            target: TargetLinear = by_name[module.lora_adapters.name]
            factors: dict[int, Factors] = {}
            for job, adapter in self.setting.adapters.items():
                factors[job] = eager_factors(target, adapter, self.setting.dtype)
                parameters[job] += factors[job]
            module.eager_adapters, module.eager_specs = factors, self.setting.adapters
        return {job: EagerSteps(mine, RULE, self.groups.device) for job, mine in parameters.items()}


def make_adapters(jobs: int, *, rank: int, alpha: float, dropout: float) -> dict[int, AdapterSpec]:
    """Equal adapters for all jobs, on every linear."""
    return {
        job: AdapterSpec(
            name=f"job{job}", rank=rank, alpha=alpha, dropout=dropout, target_modules=TARGETS, seed=1000 + job
        )
        for job in range(jobs)
    }


def make_backend(device: torch.device) -> Backend:
    """The fused kernels on a GPU, their reference elsewhere."""
    if device.type != "cuda":
        return TorchBackend()
    from ...lora.triton_backend import TritonBackend

    return TritonBackend()


def _distinct(schedule: Schedule) -> Schedule:
    """The schedule's microbatches of different size classes, and one optimizer step a job: what a warm-up must see.

    Attention libraries and the kernels' tuning know tokens, samples and lengths by powers of two.
    """
    seen: dict[tuple[int, ...], Microbatch] = {}
    for microbatch in schedule.replicas[0]:
        rows = microbatch.padded_tokens(schedule.padding_multiple)
        longest = max((sample.tokens for sample in microbatch.samples), default=0)
        together = len({sample.job for sample in microbatch.samples})
        key = (*(value.bit_length() for value in (rows - 1, len(microbatch.samples) - 1, longest - 1)), together > 1)
        seen.setdefault(key, microbatch)
    stream = tuple(seen.values())
    jobs = sorted({sample.job for microbatch in stream for sample in microbatch.samples})
    return Schedule(
        replicas=(stream,),
        step_ends=tuple(StepEnd(job=job, step=1, position=len(stream) - 1) for job in jobs),
        distance=schedule.distance,
        token_capacity=schedule.token_capacity,
        padding_multiple=schedule.padding_multiple,
    )


def _eager_class(base: type) -> type:
    return type(f"EagerLoraOf{base.__name__}", (EagerLora, base), {"__module__": __name__})


def _shifted(span: Span, first: float) -> Span:
    return Span(
        kind=span.kind, position=span.position, chunk=span.chunk, start=span.start - first, stop=span.stop - first,
        noop=span.noop,
    )  # fmt: skip


def _randomize(chunks: Sequence[torch.nn.Module]) -> None:
    """Random weights: zeros would make products faster than they are, and uninitialized memory may hold anything."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.ndim == 1:
                parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.data.normal_(std=0.02)
