"""What tests run inside the ranks of a run, around the command itself.

Megatron is imported in the ranks alone, which have it already; the tests' own process would take seconds for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafusion_megatron.types import Schedule
from tests.launch import command

if TYPE_CHECKING:
    from lorafusion_megatron.mcore.steps import AdapterSteps
    from lorafusion_megatron.training import rack, trainer

GRADIENTS = {
    ("inf once", 2): float("inf"),
    ("nan once", 2): float("nan"),
    **{("inf always", step): float("inf") for step in range(2, 100)},
}
"""(kind of fault, optimizer step) -> what stands in the job's gradient then."""


def keep_schedules(words: list[str], file: str) -> int:
    """Train, and keep the schedules that rank 0 ran."""
    from lorafusion_megatron.mcore.stream import StreamRunner

    kept: list[Schedule] = []
    run = StreamRunner.run

    def running(self: StreamRunner, schedule: Schedule, *args: Any, **options: Any) -> Any:
        kept.append(schedule)
        return run(self, schedule, *args, **options)

    StreamRunner.run = running
    status = command(words)
    if os.environ["RANK"] == "0":
        Path(file).write_bytes(pickle.dumps(kept))
    return status


def keep_digests(words: list[str], file: str) -> int:
    """Train, and keep what every rank held of each adapter after its last step and when its job left the model."""
    from lorafusion_megatron.mcore.steps import AdapterSteps
    from lorafusion_megatron.training import rack, trainer

    unmount, close, apply = rack.AdapterRack.unmount, trainer.Trainer._close, AdapterSteps.apply
    mine: dict[str, Any] = {}
    after_step: dict[int, list[Any]] = {}

    def applying(self: AdapterSteps) -> Any:
        report = apply(self)
        after_step[self.job] = _digest(self.shard.master)
        return report

    def unmounting(self: rack.AdapterRack, job: Any) -> None:
        shard = self.shards[job.index]
        replicated, split = shard.master[: shard.num_replicated], shard.master[shard.num_replicated :]
        mine[job.name] = {
            "replicated": _digest(replicated),
            "split": _digest(split),
            "whole": _digest(shard.master),
            "after its last step": after_step[job.index],
        }
        unmount(self, job)

    def closing(self: trainer.Trainer, *args: Any) -> None:
        groups = self.groups
        found = groups.gather({"pp": groups.pp_rank, "tp": groups.tp_rank, "dp": groups.dp_rank, "held": mine})
        if found is not None:
            Path(file).write_text(json.dumps(found))
        close(self, *args)

    rack.AdapterRack.unmount, trainer.Trainer._close, AdapterSteps.apply = unmounting, closing, applying
    return command(words)


def keep_base(words: list[str], file: str, fusion: bool) -> int:
    """Train, with Megatron's gradient fusion asked for on every linear or not, and keep what became of the base."""
    from lorafusion_megatron.training import rack, trainer

    make, close = rack.AdapterRack.__init__, trainer.Trainer._close
    loaded: dict[str, torch.Tensor] = {}

    def making(self: rack.AdapterRack, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        for chunk in self.chunks:
            for module in chunk.modules():
                if hasattr(module, "gradient_accumulation_fusion"):
                    module.gradient_accumulation_fusion = fusion
            chunk.config.gradient_accumulation_fusion = fusion
        loaded.update({name: p.clone() for chunk in self.chunks for name, p in chunk.named_parameters()})

    def closing(self: trainer.Trainer, *args: Any) -> None:
        parameters = {name: p for chunk in self.rack.chunks for name, p in chunk.named_parameters()}
        found = {
            "parameters": len(parameters),
            "changed": [name for name, p in parameters.items() if not torch.equal(p, loaded[name])],
            "with gradient": [
                name
                for name, p in parameters.items()
                if p.requires_grad or p.grad is not None or getattr(p, "main_grad", None) is not None
            ],
        }
        Path(file).write_text(json.dumps(found))
        close(self, *args)

    rack.AdapterRack.__init__, trainer.Trainer._close = making, closing
    return command(words)


def _digest(values: torch.Tensor) -> list[Any]:
    return [values.numel(), hashlib.sha256(values.numpy().tobytes()).hexdigest()]


def spoil_steps(words: list[str], job: int, kind: str) -> int:
    """Train with one job's numbers spoiled: its gradient at some steps, or its weights after its first step."""
    from lorafusion_megatron.mcore.steps import AdapterSteps

    end_step, apply = AdapterSteps.end_step, AdapterSteps.apply

    def ending(self: AdapterSteps, step: int) -> None:
        if self.job == job and self.shard.numel and (kind, step) in GRADIENTS:
            self.shard.grad[0] = GRADIENTS[kind, step]
        end_step(self, step)

    def applying(self: AdapterSteps) -> Any:
        report = apply(self)
        if self.job == job and kind == "weights" and self.applied == 1:
            self.shard.master.fill_(1e30)
            self.shard.refresh()
        return report

    AdapterSteps.end_step, AdapterSteps.apply = ending, applying
    return command(words)


def rehearse_on_cpu(words: list[str]) -> int:
    """Train with the first microbatch rehearsed, as GPUs do it."""
    from lorafusion_megatron.training import trainer

    rehearsed = []
    original = trainer.rehearse

    def watched(*args: Any) -> None:
        original(*args)
        rehearsed.append(True)

    trainer.REHEARSED.add("cpu")
    trainer.rehearse = watched
    status = command(["train", *words])
    assert rehearsed == [True]
    return status


def train_on_rows_without_a_number(words: list[str]) -> int:
    """Train where every second step of each job has a loss that is not finite, however its rows are weighed.

    Says where such a row ran again with the weight 0.
    """
    from lorafusion_megatron.training import batches

    original = batches.host_batch

    def spoiled(packed: Any, **options: Any) -> Any:
        for job in range(3):
            rows = (packed.row_job == job) & (packed.row_step % 2 == 0)
            if rows.any() and not packed.loss_weights[rows].any():
                print("a row without a number runs again", flush=True)
            packed.loss_weights[rows] = float("nan")
        return original(packed, **options)

    batches.host_batch = spoiled
    return command(["train", *words])
