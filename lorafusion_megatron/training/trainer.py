"""The loop: plan a window, run it through Megatron's schedule, write what its steps produced."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.collate import collate
from ..lora.bank import AdapterShard, FactorPiece
from ..mcore.batch import device_batch
from ..mcore.build import BuildOptions, build_chunks, canonical_parameters
from ..mcore.gather import gather_factors
from ..mcore.inject import inject
from ..mcore.parallel import Groups
from ..mcore.steps import AdapterSteps, StepRule
from ..mcore.stream import DeviceBatch, StreamRunner, WindowResult
from ..models.adapter import load_initial_adapter, write_adapter
from ..models.load import load_base_weights
from ..scheduler.build import PlanOptions, build_schedule
from ..types import Schedule, StepReport
from .adapters import from_peft, to_peft
from .loggers import Loggers
from .output import MetricsLog, chrome_trace, write_json
from .progress import Progress
from .setup import Prepared, linear_layouts
from .windows import window_shares


@dataclass(kw_only=True)
class _JobState:
    """Where a job stands; the same on every rank."""

    num_steps: int
    planned: int = 0
    """Steps that are in a window already."""
    losses: list[float] = field(default_factory=list)
    snapshots: dict[int, list[FactorPiece]] = field(default_factory=dict)
    """Step -> this rank's part of the adapter as it was then; written at the end of the window."""


class Trainer:
    """All jobs of a run on this rank. Every rank makes one and calls `train`.

    Args:
        prepared: the checked run.
        groups: this rank's process groups.
        progress: where steps and windows are shown (rank 0).
    """

    def __init__(self, prepared: Prepared, groups: Groups, progress: Progress) -> None:
        self.prepared, self.groups, self.progress = prepared, groups, progress
        run = prepared.run
        self.folder = Path(run.checkpoint.save)
        self.names = [job.name for job in run.jobs]
        self.jobs = {index: _JobState(num_steps=source.num_steps) for index, source in prepared.sources.items()}
        self.chunks, self.steps = self._build()
        self.runner = StreamRunner(self.chunks, self.steps, on_step=self._on_step)
        self.metrics = MetricsLog(self.folder / "metrics.jsonl") if groups.is_first else None
        self.loggers = Loggers(run) if groups.is_first else None
        self.windows: list[dict[str, Any]] = []
        self.spans: list[dict[str, Any]] = []

    def train(self) -> None:
        """Train every job to its end and write its adapter."""
        while any(state.planned < state.num_steps for state in self.jobs.values()):
            schedule = self._plan()
            self.progress.window(schedule, self.names)
            result = self.runner.run(schedule, lambda schedule=schedule: self._batches(schedule))
            self._write_snapshots()
            self._close_window(schedule, result)
        if self.groups.is_first:
            stages = [f"stage {stage}" for stage in range(self.groups.pp_size)]
            write_json(self.folder / "trace.json", chrome_trace(self.spans, stages))
        if self.metrics:
            self.metrics.close()
        if self.loggers:
            self.loggers.close()

    def _build(self) -> tuple[list[torch.nn.Module], dict[int, AdapterSteps]]:
        """Frozen model with its weights, adapters with their first values, optimizers."""
        prepared, groups = self.prepared, self.groups
        run, spec = prepared.run, prepared.spec
        dtype = getattr(torch, run.base_model.dtype)
        options = BuildOptions(
            dtype=dtype,
            device=groups.device,
            layers_per_chunk=prepared.layers_per_chunk,
            transformer_impl=prepared.transformer_impl,
            recompute_granularity=run.model.recompute_granularity,
        )
        chunks = build_chunks(spec, prepared.topology, options)
        load_base_weights(
            run.base_model.path, spec, canonical_parameters(chunks), tp_rank=groups.tp_rank, tp_size=groups.tp_size
        )
        targets = inject(
            chunks,
            linear_layouts(spec, run, groups.tp_rank, groups.tp_size),
            backend=prepared.backend,
            tp_rank=groups.tp_rank,
            tp_size=groups.tp_size,
        )
        steps = {}
        for index, job in enumerate(run.jobs):
            adapter = run.adapter_spec(index)
            shard = AdapterShard(adapter, targets, dtype=dtype)
            if job.peft.init_from is not None:
                tensors = load_initial_adapter(job.peft.init_from, spec, adapter, key=f"jobs[{index}].peft.init_from")
                shard.load(from_peft(tensors, adapter, spec))
            shard.attach(index)
            steps[index] = AdapterSteps(index, shard, self._rule(index), groups)
        return chunks, steps

    def _rule(self, index: int) -> StepRule:
        job, total = self.prepared.run.jobs[index], self.jobs[index].num_steps
        return StepRule(
            lr_at=lambda step: job.lr_at(step, total),
            betas=(job.optimizer.adam_beta1, job.optimizer.adam_beta2),
            eps=job.optimizer.adam_eps,
            weight_decay=job.optimizer.weight_decay,
            clip_grad=job.optimizer.clip_grad,
            max_bad_steps=job.train.max_bad_steps,
        )

    def _plan(self) -> Schedule:
        """The next window: made on rank 0, the same on all ranks."""
        prepared, runtime = self.prepared, self.prepared.run.runtime
        remaining = {
            job: state.num_steps - state.planned for job, state in self.jobs.items() if state.planned < state.num_steps
        }
        tokens = {
            job: float(prepared.datasets[job].lengths.mean() * prepared.sources[job].global_batch_size)
            for job in remaining
        }
        budget = float(runtime.max_window_microbatches * runtime.token_capacity * prepared.topology.data_parallel)
        shares = window_shares(remaining, tokens, budget)
        schedule = None
        if self.groups.is_first:
            batches = [
                [prepared.sources[job].batch(self.jobs[job].planned + 1 + i) for i in range(count)]
                for job, count in shares.items()
            ]
            schedule = build_schedule(
                batches,
                PlanOptions(
                    token_capacity=runtime.token_capacity,
                    padding_multiple=prepared.padding_multiple,
                    stages=prepared.topology.pipeline_parallel,
                    virtual_stages=prepared.topology.virtual_pipeline or 1,
                    replicas=prepared.topology.data_parallel,
                    schedule=runtime.schedule,
                ),
            )
        for job, count in shares.items():
            self.jobs[job].planned += count
        return self.groups.broadcast(schedule)

    def _batches(self, schedule: Schedule) -> Iterator[DeviceBatch]:
        """This replica's microbatches, in order."""
        prepared = self.prepared
        seeds = {index: prepared.run.job_seed(index) for index in self.jobs}
        slots = {index: index for index in self.jobs}
        for microbatch in schedule.replicas[self.groups.dp_rank]:
            packed = collate(
                microbatch, prepared.datasets, prepared.padding_multiple, row_multiple=prepared.row_multiple
            )
            yield device_batch(packed, seeds=seeds, slots=slots, tile=prepared.backend.tile, device=self.groups.device)

    def _on_step(self, report: StepReport) -> None:
        """A job's step was applied on this stage."""
        state, run = self.jobs[report.job], self.prepared.run
        state.losses.append(report.loss)
        interval = run.checkpoint.save_interval
        if report.step == state.num_steps or (interval and report.step % interval == 0):
            state.snapshots[report.step] = self.steps[report.job].shard.pieces()
        if self.metrics and self.loggers:
            batch = self.prepared.sources[report.job].batch(report.step)
            tokens = sum(sample.tokens for sample in batch.samples)
            counts = {"tokens": tokens, "label_tokens": batch.label_tokens, "samples": len(batch.samples)}
            self.metrics.step(report, name=self.names[report.job], **counts)
            self.loggers.step(report, name=self.names[report.job], **counts)
            self.progress.step(report, name=self.names[report.job], total=state.num_steps, tokens=tokens)

    def _write_snapshots(self) -> None:
        """Write the adapters that steps of this window left; every rank takes part in gathering them."""
        run = self.prepared.run
        for index, state in self.jobs.items():
            for step, pieces in sorted(state.snapshots.items()):
                factors = gather_factors(pieces, self.groups)
                if factors is None:
                    continue
                adapter = run.adapter_spec(index)
                tensors = to_peft(factors, self.prepared.spec)
                folder = self.folder / self.names[index]
                write_adapter(folder, adapter, run.base_model.path, tensors)
                write_json(folder / "losses.json", state.losses[:step])
                if run.checkpoint.save_interval:
                    write_adapter(folder / f"step_{step}", adapter, run.base_model.path, tensors)
                    _drop_old_steps(folder, run.checkpoint.keep)
            state.snapshots.clear()

    def _close_window(self, schedule: Schedule, result: WindowResult) -> None:
        """Idle share of the stages' time in this window, and the timeline."""
        mine = (self.groups.pp_rank, self.groups.dp_rank, self.groups.tp_rank, result)
        everyone = self.groups.gather(mine)
        if everyone is None:
            return
        wall = max(r.stopped for *_, r in everyone) - min(r.started for *_, r in everyone)
        busy = sum(r.busy_seconds for *_, r in everyone) / len(everyone)
        self.progress.window_done(bubble_share=max(0.0, 1.0 - busy / wall), seconds=wall)
        for stage, replica, tensor, part in everyone:
            if replica or tensor:
                continue
            for span in part.spans:
                microbatch = schedule.replicas[0][span.position]
                jobs = Counter(self.names[sample.job] for sample in microbatch.samples)
                self.spans.append(
                    {
                        "stage": stage,
                        "kind": span.kind,
                        "name": f"{span.kind[0].upper()}{span.position} {'+'.join(jobs) or 'no-op'}",
                        "start": span.start,
                        "stop": span.stop,
                        "args": {"chunk": span.chunk, "samples": dict(jobs)},
                    }
                )


def _drop_old_steps(folder: Path, keep: int) -> None:
    """Keep the newest ``keep`` step folders."""
    import shutil

    steps = sorted((int(p.name.removeprefix("step_")), p) for p in folder.glob("step_*") if p.name[5:].isdigit())
    for _, path in steps[:-keep]:
        shutil.rmtree(path)
