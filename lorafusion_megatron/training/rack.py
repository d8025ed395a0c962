"""The frozen model of a rank and the adapters that are mounted on it, one a slot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..lora.bank import AdapterShard
from ..lora.layout import TargetLinear
from ..mcore.build import BuildOptions, build_chunks, canonical_parameters
from ..mcore.device_steps import make_steps
from ..mcore.inject import inject
from ..mcore.parallel import Groups
from ..mcore.steps import AdapterSteps, StepCounters, StepRule
from ..models.load import load_base_weights
from ..types import AdapterSpec
from .adapters import from_peft
from .jobs import Job
from .setup import Prepared, linear_layouts
from .state import load_job


@dataclass(frozen=True, kw_only=True)
class InjectedModel:
    """This rank's frozen model with its weights, whose linears serve adapters."""

    chunks: Sequence[torch.nn.Module]
    """What Megatron's schedules run, one a virtual stage; wrapped or not."""
    targets: Sequence[TargetLinear]


def build_model(prepared: Prepared, groups: Groups) -> InjectedModel:
    """Build a rank's part of the base model of a run, read its weights, and inject adapters."""
    run, spec = prepared.run, prepared.spec
    options = BuildOptions(
        dtype=getattr(torch, run.base_model.dtype),
        device=groups.device,
        layers_per_chunk=prepared.layers_per_chunk,
        transformer_impl=prepared.transformer_impl,
        recompute_granularity=run.model.recompute_granularity,
    )
    chunks = build_chunks(spec, prepared.topology, options)
    return InjectedModel(chunks=chunks, targets=load_and_inject(chunks, prepared, groups))


def load_and_inject(chunks: Sequence[torch.nn.Module], prepared: Prepared, groups: Groups) -> list[TargetLinear]:
    """Fill frozen GPTModel chunks with the base model's weights and take their linears over.

    Raises:
        UserError: the checkpoint doesn't fit the model.
    """
    spec = prepared.spec
    load_base_weights(
        prepared.run.base_model.path,
        spec,
        canonical_parameters(chunks),
        tp_rank=groups.tp_rank,
        tp_size=groups.tp_size,
    )
    return inject(
        chunks,
        linear_layouts(spec, groups.tp_rank, groups.tp_size),
        backend=prepared.backend,
        tp_rank=groups.tp_rank,
        tp_size=groups.tp_size,
    )


class AdapterRack:
    """This rank's model, and the adapters of the jobs that are training.

    Every job has two slots: an even one, and the odd one after it, which is the same adapter without dropout, for
    validation.
    """

    def __init__(self, prepared: Prepared, groups: Groups, model: InjectedModel) -> None:
        self._prepared, self._groups = prepared, groups
        self._dtype = getattr(torch, prepared.run.base_model.dtype)
        self.chunks, self._targets = list(model.chunks), list(model.targets)
        self.steps: dict[int, AdapterSteps] = {}
        """Job -> its optimizer steps, in the order in which the jobs came."""
        self.shards: dict[int, AdapterShard] = {}
        self._slots: dict[int, int] = {}

    def mount(
        self,
        job: Job,
        adapter: AdapterSpec,
        *,
        state: Path | None = None,
        counters: StepCounters | None = None,
        initial: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Give a job a slot and fresh buffers; fill them from a checkpoint, an initial adapter, or PEFT's start.

        Where memory is short it raises, and nothing has changed.

        Args:
            job: the job; its slot is set.
            adapter: its adapter.
            state: checkpoint to take masters and moments from.
            counters: the job's counts in that checkpoint; None: it is not in it.
            initial: the adapter that it starts from, by PEFT's keys.
        """
        assert job.index not in self.shards
        taken = set(self._slots.values())
        slot = next(slot for slot in range(0, 2 * len(taken) + 2, 2) if slot not in taken)
        shard = AdapterShard(adapter, self._targets, dtype=self._dtype, device=self._groups.device)
        steps = make_steps(job.index, shard, self._rule(job), self._groups, chunks=len(self.chunks))
        # Also of a new job: its moments take their place now, and not at its first step.
        restored = steps.restore(counters or StepCounters(applied=0, optimizer_steps=0, bad_steps=0, stopped=False))
        if state is not None and counters is not None:
            moments = dict(zip(("exp_avg", "exp_avg_sq"), restored, strict=True))
            for part, factors in load_job(state, job.name, shard.factor_keys()):
                shard.load(factors, moments.get(part))
        elif initial is not None:
            shard.load(from_peft(initial, adapter, self._prepared.spec))
        shard.attach(slot)
        shard.attach(slot + 1, dropout=False)
        self.steps[job.index], self.shards[job.index] = steps, shard
        self._slots[job.index] = job.slot = slot

    def unmount(self, job: Job) -> None:
        """Free a job's slot and buffers."""
        assert job.slot is not None
        shard = self.shards.pop(job.index)
        shard.detach(job.slot)
        shard.detach(job.slot + 1)
        del self.steps[job.index], self._slots[job.index]
        job.slot = None

    def _rule(self, job: Job) -> StepRule:
        config = job.config
        return StepRule(
            lr_at=lambda step: config.lr_at(step, job.num_steps),
            betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
            eps=config.optimizer.adam_eps,
            weight_decay=config.optimizer.weight_decay,
            clip_grad=config.optimizer.clip_grad,
            max_bad_steps=config.train.max_bad_steps,
        )
