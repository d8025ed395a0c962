"""Optimizer steps of one adapter on one stage: reduced when its last backward is done, applied just before needed.

`end_step` runs right after the backward of the step's last microbatch: gradients of replicated factors are summed
over TP, everything over DP, and the square of the norm starts its way over the stages. `apply` runs just before the
next forward that reads the adapter. By then the slower stages are done: forward j reaches the last stage only after
stage 0 ran it, which is after stage 0's backward of the step's last microbatch, so clipping costs no bubble.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..lora.bank import AdapterShard
from ..types import StepReport
from .parallel import Groups


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """How one job is optimized: AdamW with decoupled weight decay, clipping by that job's own norm."""

    lr_at: Callable[[int], float]
    """Learning rate of an optimizer step, counted from 1."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    """Largest norm of the job's gradient; 0 turns clipping off."""
    max_bad_steps: int
    """Consecutive steps without a finite gradient after which the job is stopped."""


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A step whose reductions are under way."""

    step: int
    sums: torch.Tensor
    """fp64 ``[2]``: square of the gradient's norm, loss; summed over the ranks of a replica."""
    work: dist.Work | None


@dataclass(frozen=True, kw_only=True)
class StepSnapshot:
    """A copy of one job's state on this rank between two optimizer steps."""

    master: torch.Tensor
    """fp32 ``[numel]``, as are the moments."""
    exp_avg: torch.Tensor | None
    """None, as is the other moment, where the adapter alone was copied."""
    exp_avg_sq: torch.Tensor | None
    counters: "StepCounters"
    ready: torch.cuda.Event | None = None
    """Passed when a GPU has made the copy; None on the CPU."""


@dataclass(frozen=True, kw_only=True)
class StepCounters:
    """What of a job's state is the same on every rank."""

    applied: int
    """Optimizer steps done, the skipped ones included."""
    optimizer_steps: int
    """Steps that AdamW took: its bias correction counts these."""
    bad_steps: int
    """Skipped steps in a row."""
    stopped: bool


class AdapterSteps:
    """The optimizer steps of one job on this rank. Every rank of a replica calls it in the same order."""

    def __init__(self, job: int, shard: AdapterShard, rule: StepRule, groups: Groups) -> None:
        self.job, self.shard, self.rule, self.groups = job, shard, rule, groups
        self.applied = 0
        self.optimizer_steps = 0
        self.bad_steps = 0
        self.stopped = False
        self._pending: _Pending | None = None
        parameter = torch.nn.Parameter(shard.master, requires_grad=True)
        parameter.grad = shard.grad[:-1]
        self.optimizer = torch.optim.AdamW(
            [parameter],
            lr=0.0,
            betas=rule.betas,
            eps=rule.eps,
            weight_decay=rule.weight_decay,
            foreach=False,
            fused=shard.master.is_cuda,
        )

    @property
    def counters(self) -> StepCounters:
        """The counts of this job."""
        return StepCounters(
            applied=self.applied,
            optimizer_steps=self.optimizer_steps,
            bad_steps=self.bad_steps,
            stopped=self.stopped,
        )

    def snapshot(self, *, moments: bool = True) -> StepSnapshot:
        """Copy masters, and with ``moments`` these, as they are now, on the device; no step may be half applied."""
        exp_avg, exp_avg_sq = (moment.clone() for moment in self._moments()) if moments else (None, None)
        master, ready = self.shard.master.clone(), None
        if master.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        return StepSnapshot(master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, counters=self.counters, ready=ready)

    @torch.no_grad()
    def restore(self, counters: StepCounters) -> tuple[torch.Tensor, torch.Tensor]:
        """Take counts from a snapshot; returns the moments' flat buffers for the caller to fill."""
        self.applied, self.bad_steps, self.stopped = counters.applied, counters.bad_steps, counters.stopped
        self.optimizer_steps = counters.optimizer_steps
        parameter = self.optimizer.param_groups[0]["params"][0]
        step = torch.tensor(
            float(counters.optimizer_steps), device=parameter.device if self.shard.master.is_cuda else "cpu"
        )
        moments = torch.zeros_like(self.shard.master), torch.zeros_like(self.shard.master)
        self.optimizer.state[parameter] = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        return moments

    def discard_gradient(self) -> None:
        """Forget what microbatches of an unfinished step left."""
        assert not self.pending
        self.shard.grad.zero_()

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        parameter = self.optimizer.param_groups[0]["params"][0]
        state = self.optimizer.state.get(parameter)
        if not state:
            return torch.zeros_like(self.shard.master), torch.zeros_like(self.shard.master)
        return state["exp_avg"], state["exp_avg_sq"]

    @property
    def pending(self) -> bool:
        """Whether a step waits to be applied."""
        return self._pending is not None

    @property
    def ready(self) -> bool:
        """Whether the pending step can be applied without waiting."""
        return self._pending is not None and (self._pending.work is None or self._pending.work.is_completed())

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Start the reductions of ``step``; its last microbatch has just run backward on this stage."""
        assert self._pending is None
        assert step == self.applied + 1
        self._sum_replicated()
        if self.groups.dp_size > 1:
            dist.all_reduce(self.shard.grad, group=self.groups.data)
        sums = self._own_sums()
        work = None
        if self.groups.tp_size * self.groups.pp_size > 1:
            work = dist.all_reduce(sums, group=self.groups.model, async_op=True)
        self._pending = _Pending(step=step, sums=sums, work=work)

    @torch.no_grad()
    def apply(self) -> StepReport:
        """Finish the pending step: clip, AdamW on the fp32 masters, new parameters, gradients to zero.

        A step whose gradient or loss is not finite changes nothing but the counters.
        """
        assert self._pending is not None
        pending, self._pending = self._pending, None
        if pending.work is not None:
            pending.work.wait()
        square, loss = pending.sums.tolist()
        norm = math.sqrt(square) if square >= 0 else math.nan
        lr = self.rule.lr_at(pending.step)
        finite = math.isfinite(norm) and math.isfinite(loss)
        self.applied = pending.step
        if finite and not self.stopped:
            self._step(norm, lr)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.stopped = self.stopped or self.bad_steps >= self.rule.max_bad_steps
        self.shard.grad.zero_()
        return StepReport(
            job=self.job, step=pending.step, loss=loss, grad_norm=norm, lr=lr, skipped=not finite or self.stopped
        )

    def _sum_replicated(self) -> None:
        """Sum over TP what every tensor rank holds alike; the loss, which each of them computed, counts once."""
        if self.groups.tp_size == 1:
            return
        if self.shard.num_replicated:
            dist.all_reduce(self.shard.grad[: self.shard.num_replicated], group=self.groups.tensor)
        if self.groups.tp_rank:
            self.shard.loss.zero_()

    def _own_sums(self) -> torch.Tensor:
        """fp64 ``[2]``: square of this rank's part of the norm, replicated factors on one tensor rank; loss."""
        grad = self.shard.grad
        counted = grad[self.shard.num_replicated if self.groups.tp_rank else 0 : -1]
        return torch.stack((torch.linalg.vector_norm(counted, dtype=torch.float64).square(), grad[-1].double()))

    def _step(self, norm: float, lr: float) -> None:
        self.optimizer_steps += 1
        if not self.shard.numel:
            return
        if self.rule.clip_grad > 0:
            # torch.nn.utils.clip_grad_norm_: the same small number keeps a zero norm from dividing.
            factor = self.rule.clip_grad / (norm + 1e-6)
            if factor < 1.0:
                self.shard.grad[:-1].mul_(factor)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.shard.refresh()
