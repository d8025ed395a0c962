"""Continuous 1F1B: one pass of Megatron's own schedule over a window of microbatches of many jobs and steps.

The schedule is data; this file only obeys it. Megatron's schedule asks for forwards through ``forward_step`` and
runs backwards through ``schedules.backward_step``, a module attribute that is observed while the pass runs: it is
told no microbatch number, so backwards are counted (1F1B finishes microbatches in order on every stage).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules

from ..lora.routing import Routing
from ..types import Schedule, StepReport
from .steps import AdapterSteps
from .stop import StopVote


@dataclass
class RoutedPackedSeqParams(PackedSeqParams):
    """Megatron's packing parameters, which it hands to every block, with the microbatch's adapter routing."""

    routing: Routing | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """One microbatch, ready on the device."""

    jobs: tuple[int, ...]
    """Job of each of the routing's segments; empty for a no-op microbatch."""
    input_ids: torch.Tensor
    """int64 ``[1, tokens]``."""
    labels: torch.Tensor
    """int64 ``[1, tokens]``."""
    position_ids: torch.Tensor
    """int64 ``[1, tokens]``, restarting with each sample."""
    loss_weights: torch.Tensor
    """fp32 ``[tokens]``: one over the label tokens of the sample's global batch where the next token is a label."""
    packed: RoutedPackedSeqParams


@dataclass(frozen=True, kw_only=True)
class Span:
    """Time of one forward or backward on this stage, in seconds of `time.perf_counter`."""

    kind: str
    position: int
    chunk: int
    start: float
    stop: float


@dataclass(kw_only=True)
class WindowResult:
    """What this rank saw of a window."""

    spans: list[Span] = field(default_factory=list)
    started: float = 0.0
    stopped: float = 0.0
    cut: int | None = None
    """First position that did not count, where the ranks agreed to stop in this window."""

    @property
    def busy_seconds(self) -> float:
        """Time spent in forwards and backwards."""
        return sum(span.stop - span.start for span in self.spans)


class StreamRunner:
    """Runs windows of microbatches through this rank's model chunks and steps the adapters on the way."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        steps: Mapping[int, AdapterSteps],
        *,
        on_applied: Callable[[int, int], None],
        on_report: Callable[[StepReport], None],
    ) -> None:
        self.chunks = list(chunks)
        self.steps = steps
        self._on_applied, self._on_report = on_applied, on_report

    def apply(self, job: int) -> None:
        """Apply a job's pending step on this stage and tell of it."""
        report = self.steps[job].apply()
        self._on_applied(job, self.steps[job].applied)
        self._on_report(report)

    def run(
        self,
        schedule: Schedule,
        batches: Callable[[], Iterator[DeviceBatch]],
        *,
        noop: DeviceBatch,
        vote: StopVote | None = None,
    ) -> WindowResult:
        """Train one window; every step that ends in it is applied on this stage when it returns.

        Args:
            schedule: the window.
            batches: makes an iterator over this replica's microbatches in order; called once a model chunk.
            noop: a no-op microbatch.
            vote: agrees on where to stop. From that position on only no-op microbatches run, so that the pipeline
                drains at once; steps that would end there are left out, and what their microbatches added to
                gradients is forgotten.
        """
        window = _Window(self, schedule, noop, vote)
        result = window.result
        iterators = [window.numbered(batches(), chunk) for chunk in range(len(self.chunks))]
        result.started = time.perf_counter()
        with _observed_backward(window.after_backward):
            get_forward_backward_func()(
                forward_step_func=window.forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=schedule.num_microbatches,
                seq_length=schedule.token_capacity,
                micro_batch_size=1,
                forward_only=False,
            )
        result.stopped = time.perf_counter()
        for job, steps in self.steps.items():
            if steps.pending:
                self.apply(job)
            if window.cut is not None:
                steps.discard_gradient()
        result.cut = window.cut
        return result

    @torch.no_grad()
    def evaluate(
        self, batches: Callable[[], Iterator[DeviceBatch]], num_microbatches: int, token_capacity: int
    ) -> dict[int, torch.Tensor]:
        """Forward only: per job the sum of its weighted cross-entropy on this rank (last stage; else nothing).

        Args:
            batches: makes an iterator over this replica's microbatches; called once a model chunk.
            num_microbatches: how many it yields.
            token_capacity: rows of the largest.
        """
        sums: dict[int, torch.Tensor] = {}

        def forward_step(iterator: Iterator[DeviceBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(iterator)
            output = model(
                batch.input_ids, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.packed
            )
            return output, partial(loss, batch)

        def loss(batch: DeviceBatch, per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            weighted = per_token.view(-1).float() * batch.loss_weights
            routing = batch.packed.routing
            assert routing is not None
            for job, segment in zip(batch.jobs, routing.segments, strict=True):
                part = weighted[segment.start : segment.stop].sum()
                sums[job] = sums[job] + part if job in sums else part
            return weighted.sum(), torch.zeros((), dtype=torch.int, device=weighted.device), {}

        iterators = [batches() for _ in self.chunks]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=num_microbatches,
            seq_length=token_capacity,
            micro_batch_size=1,
            forward_only=True,
        )
        return sums


class _Window:
    """State of one pass: which forward and which backward comes next on this stage."""

    def __init__(self, runner: StreamRunner, schedule: Schedule, noop: DeviceBatch, vote: StopVote | None) -> None:
        self.runner, self.schedule = runner, schedule
        self._noop, self._vote = noop, vote
        self.result = WindowResult()
        self._backwards = _backward_order(schedule.num_microbatches, len(runner.chunks))

    @property
    def cut(self) -> int | None:
        """First position that does not count any more, where the ranks agreed to stop within this window."""
        position = self._vote.position if self._vote else None
        return position if position is not None and position < self.schedule.num_microbatches else None

    def numbered(self, batches: Iterator[DeviceBatch], chunk: int) -> Iterator[tuple[int, int, DeviceBatch]]:
        """(chunk, position, microbatch)."""
        for position, batch in enumerate(batches):
            yield chunk, position, batch

    def forward_step(
        self, data_iterator: Iterator[tuple[int, int, DeviceBatch]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        """Megatron's ``forward_step_func``: steps that this microbatch reads are applied first."""
        chunk, position, batch = next(data_iterator)
        if self._vote is not None and chunk == 0:
            self._vote.at(position)
        if self.cut is not None and position >= self.cut:
            batch = self._noop
        for job, steps in self.runner.steps.items():
            if steps.pending and (job in batch.jobs or steps.ready):
                self.runner.apply(job)
        start = time.perf_counter()
        output = model(
            batch.input_ids,
            batch.position_ids,
            None,
            labels=batch.labels,
            packed_seq_params=batch.packed,
        )
        self.result.spans.append(
            Span(kind="forward", position=position, chunk=chunk, start=start, stop=time.perf_counter())
        )
        return output, partial(self._loss, batch)

    def after_backward(self, start: float) -> None:
        """One backward is done on this stage: start the steps that end with it."""
        chunk, position = next(self._backwards)
        self.result.spans.append(
            Span(kind="backward", position=position, chunk=chunk, start=start, stop=time.perf_counter())
        )
        if self.cut is not None and position >= self.cut:
            return
        if chunk == 0:  # the chunk nearest to the input is the last to run backward
            for end in self.schedule.ends_at.get(position, ()):
                steps = self.runner.steps[end.job]
                if steps.pending:  # no sample of this step was in this replica's share, so no forward applied the last
                    self.runner.on_step(steps.apply())
                steps.end_step(end.step)

    def _loss(
        self, batch: DeviceBatch, per_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the weighted cross-entropy; each job's part is added to its step's loss."""
        weighted = per_token.view(-1).float() * batch.loss_weights
        routing = batch.packed.routing
        assert routing is not None
        for job, segment in zip(batch.jobs, routing.segments, strict=True):
            self.runner.steps[job].shard.loss.add_(weighted.detach()[segment.start : segment.stop].sum())
        return weighted.sum(), torch.zeros((), dtype=torch.int, device=weighted.device), {}


def _backward_order(num_microbatches: int, num_chunks: int) -> Iterator[tuple[int, int]]:
    """(chunk, position) of this stage's backwards in the order of Megatron's schedule."""
    if num_chunks == 1:
        return ((0, position) for position in range(num_microbatches))
    from megatron.core import parallel_state

    table = schedules.get_schedule_table(
        num_microbatches, num_chunks, parallel_state.get_pipeline_model_parallel_world_size()
    )
    return ((num_chunks - 1 - chunk, position) for position, chunk in table)


@contextmanager
def _observed_backward(after: Callable[[float], None]) -> Iterator[None]:
    """Call ``after(start time)`` at the end of every backward step of Megatron's schedules."""
    original = schedules.backward_step

    def observed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        gradient = original(*args, **kwargs)
        after(start)
        return gradient

    schedules.backward_step = observed
    try:
        yield
    finally:
        schedules.backward_step = original
