"""Optimizer steps that never ask the device for a number: decisions stay on it, reports arrive a little later.

The same rules as `steps.AdapterSteps`: clip by the job's own norm, AdamW on fp32 masters, a step whose gradient or
loss is not finite is left out, and the job stops after ``max_bad_steps`` of them. Every rank computes them from the
same totals, so all ranks decide alike at the same position, before any host knows.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..lora.bank import AdapterShard
from ..types import StepReport
from .parallel import Groups
from .steps import AdapterSteps, StepCounters, StepRule

REPORTS = 16
"""Reports of a job that may be under way; the host runs ahead of a GPU by a few steps at most."""


@dataclass(kw_only=True)
class _Waiting:
    """A step that ended on this stage and is not applied yet."""

    step: int
    sums: torch.Tensor
    """fp64 ``[2]``: square of the norm and loss, of this stage."""
    total: torch.Tensor | None = None
    """The same over all stages, once it is known."""
    reduced: torch.cuda.Event | None = None
    """Passed when a reduction on the side stream has filled ``total``."""


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A report on its way to the host."""

    step: int
    lr: float
    values: torch.Tensor
    """fp64 ``[4]`` in pinned memory: loss, norm, skipped, stopped."""
    arrived: torch.cuda.Event | None


class DeviceSteps(AdapterSteps):
    """The optimizer steps of one job on one GPU.

    Args:
        job, shard, rule, groups: as in `AdapterSteps`.
        side: stream of the reductions; None: replicas are summed before the step's last gradient goes on, and totals
            come through `settle`, or one stage alone makes them.

    Note: `apply` returns None; its report comes out of `reports` some microbatches later. A step is a few kernels over
        flat buffers: norm, scalars, AdamW, rounding, zeroing.
    """

    def __init__(
        self, job: int, shard: AdapterShard, rule: StepRule, groups: Groups, *, side: torch.cuda.Stream | None = None
    ) -> None:
        super().__init__(job, shard, rule, groups)
        for group in self.optimizer.param_groups:
            group["fused"] = True
        self._side = side
        self._waiting: _Waiting | None = None
        self._sent: deque[_Sent] = deque()
        self._arrived: list[StepReport] = []
        self.deliver: Callable[[StepReport], None] = self._arrived.append
        """Takes reports that a snapshot had to wait for, before the snapshot is made."""
        self._bad = torch.zeros((), dtype=torch.int64, device=shard.grad.device)
        self._stop = torch.zeros((), dtype=torch.bool, device=shard.grad.device)
        # Made once: to lock pages while a GPU works makes the host wait for it.
        self._pinned = torch.empty(REPORTS, 4, dtype=torch.float64, pin_memory=shard.grad.is_cuda)

    @property
    def by_mail(self) -> bool:
        """Whether totals over the stages come with the pipeline's messages, through `settle`."""
        return self._side is None and self.groups.pp_size > 1

    @property
    def pending(self) -> bool:
        """Whether a step waits to be applied."""
        return self._waiting is not None

    @property
    def ready(self) -> bool:
        """Whether the pending step can be applied without making the device wait."""
        waiting = self._waiting
        if waiting is None or waiting.total is None:
            return False
        return waiting.reduced is None or waiting.reduced.query()

    @property
    def sums(self) -> torch.Tensor:
        """fp64 ``[2]``: square of the norm and loss of the pending step on this stage."""
        assert self._waiting is not None
        return self._waiting.sums

    def settle(self, total: torch.Tensor) -> None:
        """Give the pending step its sums over all stages, fp64 ``[2]``."""
        assert self._waiting is not None
        self._waiting.total = total

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Start ``step``; its last microbatch has just run backward on this stage."""
        assert self._waiting is None
        assert step == self.applied + 1
        groups = self.groups
        self._sum_replicated()
        if self._side is not None:
            self._reduce_aside(step, self._side)
            return
        if groups.dp_size > 1:
            dist.all_reduce(self.shard.grad, group=groups.data)
        sums = self._own_sums()
        if groups.tp_size > 1:
            dist.all_reduce(sums, group=groups.tensor)
        self._waiting = _Waiting(step=step, sums=sums, total=sums if groups.pp_size == 1 else None)

    @torch.no_grad()
    def apply(self) -> StepReport | None:
        """Finish the pending step on the device."""
        waiting, self._waiting = self._waiting, None
        assert waiting is not None
        assert waiting.total is not None, f"step {waiting.step} of job {self.job} is needed before its norm is known"
        if waiting.reduced is not None:
            torch.cuda.current_stream().wait_event(waiting.reduced)
        lr = self.rule.lr_at(waiting.step)
        self.applied = waiting.step
        norm, loss = waiting.total[0].sqrt(), waiting.total[1]
        finite = norm.isfinite() & loss.isfinite()
        self._bad.add_(1).mul_(~finite)
        self._stop.logical_or_(self._bad >= self.rule.max_bad_steps)
        skipped = ~finite | self._stop
        self._step_unless(skipped, norm, lr)
        self.shard.grad.zero_()
        self._send(waiting.step, lr, torch.stack((loss, norm, skipped.double(), self._stop.double())))
        return None

    def reports(self, *, wait: bool = False) -> list[StepReport]:
        """Reports that came since the last call, in the order of the steps; all of them with ``wait``."""
        out, self._arrived[:] = list(self._arrived), []
        while self._sent and (wait or self._sent[0].arrived is None or self._sent[0].arrived.query()):
            out.append(self._read(self._sent.popleft()))
        return out

    @property
    def counters(self) -> StepCounters:
        """The counts of this job; waits for reports under way and hands them to `deliver`."""
        for report in self.reports(wait=True):
            self.deliver(report)
        return super().counters

    @torch.no_grad()
    def restore(self, counters: StepCounters) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AdapterSteps.restore`."""
        moments = super().restore(counters)
        self._bad.fill_(counters.bad_steps)
        self._stop.fill_(counters.stopped)
        return moments

    def _reduce_aside(self, step: int, side: torch.cuda.Stream) -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            dist.all_reduce(self.shard.grad, group=self.groups.data)
            sums = self._own_sums()
            if self.groups.tp_size * self.groups.pp_size > 1:
                dist.all_reduce(sums, group=self.groups.model)
            sums.record_stream(main)
            reduced = torch.cuda.Event()
            reduced.record(side)
        self._waiting = _Waiting(step=step, sums=sums, total=sums, reduced=reduced)

    def _step_unless(self, skipped: torch.Tensor, norm: torch.Tensor, lr: float) -> None:
        if not self.shard.numel:
            return
        if self.rule.clip_grad > 0:
            # AdamW divides by grad_scale: the inverse of min(1, clip / (norm + 1e-6)).
            self.optimizer.grad_scale = ((norm + 1e-6) / self.rule.clip_grad).clamp(min=1.0).float()
        self.optimizer.found_inf = skipped.float()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.shard.refresh()

    def _send(self, step: int, lr: float, values: torch.Tensor) -> None:
        if not values.is_cuda:
            self._sent.append(_Sent(step=step, lr=lr, values=values, arrived=None))
            return
        if len(self._sent) == REPORTS:
            self._arrived.append(self._read(self._sent.popleft()))
        pinned = self._pinned[step % REPORTS]
        pinned.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._sent.append(_Sent(step=step, lr=lr, values=pinned, arrived=arrived))

    def _read(self, sent: _Sent) -> StepReport:
        if sent.arrived is not None and not sent.arrived.query():
            sent.arrived.synchronize()
        loss, norm, skipped, stopped = sent.values.tolist()
        left_out = bool(skipped)
        self.optimizer_steps += not left_out
        self.stopped = bool(stopped)
        self.bad_steps = self.bad_steps + 1 if left_out and not (loss - loss == norm - norm == 0) else 0
        return StepReport(job=self.job, step=sent.step, loss=loss, grad_norm=norm, lr=sent.lr, skipped=left_out)


def make_steps(job: int, shard: AdapterShard, rule: StepRule, groups: Groups, *, chunks: int = 1) -> AdapterSteps:
    """The optimizer steps of a job: on the host on the CPU, on the device on a GPU.

    Args:
        job, shard, rule, groups: as in `AdapterSteps`.
        chunks: model chunks of a stage.
    """
    if groups.device.type != "cuda":
        return AdapterSteps(job, shard, rule, groups)
    aside = groups.dp_size > 1 and bears_side_reductions(groups.pp_size, chunks)
    return DeviceSteps(job, shard, rule, groups, side=torch.cuda.Stream() if aside else None)


def bears_side_reductions(stages: int, chunks: int) -> bool:
    """Whether a reduction over all stages may be under way beside the pipeline's messages.

    It ends when stage 0 has come to its part. A host that waits until then with its GPU, as the first launch of a
    kernel may, also holds its messages back; interleaved on three stages or more, stage 0 does not get there without
    them (a test plays the messages of Megatron's schedules).
    """
    return chunks == 1 or stages <= 2
