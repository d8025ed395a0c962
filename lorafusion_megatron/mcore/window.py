"""One pass of Megatron's schedule: which forward and which backward comes next on this stage, and what each entails."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from ..types import Schedule
from .attention import RoutedPackedSeqParams
from .clock import Clock, Mark
from .device_steps import DeviceSteps
from .p2p import NormMail
from .steps import AdapterSteps
from .stop import StopVote


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
    noop: bool = False
    """Whether it ran an empty microbatch, which counts as idle time."""


@dataclass(kw_only=True)
class WindowResult:
    """What this rank saw of a window."""

    spans: list[Span] = field(default_factory=list)
    started: float = 0.0
    stopped: float = 0.0
    cut: int | None = None
    """First position that did not count, where the ranks agreed to stop in this window."""

    def earlier(self, seconds: float) -> "WindowResult":
        """The same with all times ``seconds`` earlier, by another clock."""
        spans = [replace(span, start=span.start - seconds, stop=span.stop - seconds) for span in self.spans]
        return replace(self, spans=spans, started=self.started - seconds, stopped=self.stopped - seconds)

    @property
    def busy_seconds(self) -> float:
        """Time spent in forwards and backwards of microbatches that hold samples."""
        return sum(span.stop - span.start for span in self.spans if not span.noop)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How a window is run: the positions that are, and where the pipeline is flushed between them."""

    positions: tuple[int, ...]
    """Positions of the schedule, in order."""
    lengths: tuple[int, ...]
    """How many of them each pass of Megatron's schedule takes."""


def whole(schedule: Schedule) -> Passes:
    """Everything in one pass, never flushed."""
    return Passes(positions=tuple(range(schedule.num_microbatches)), lengths=(schedule.num_microbatches,))


def flushed(schedule: Schedule) -> Passes:
    """A pass for each optimizer step, as Megatron's own loop does it; no-op microbatches have no use then."""
    positions, lengths, count = [], [], 0
    for position in range(schedule.num_microbatches):
        ends = position in schedule.ends_at
        if ends or not all(replica[position].is_noop for replica in schedule.replicas):
            positions.append(position)
            count += 1
        if ends:
            lengths.append(count)
            count = 0
    return Passes(positions=tuple(positions), lengths=(*lengths, *([count] if count else [])))


class Window:
    """State of a window on this stage. Positions are counted over ``passes.positions``.

    Args:
        schedule: the window.
        passes: how it is run.
        steps: job -> its optimizer steps.
        apply: applies a job's pending step.
        poll: hands on reports that have come.
        clock: of the device.
        noop: a no-op microbatch, for positions behind a stop.
        vote: agrees on where to stop.
    """

    def __init__(
        self,
        schedule: Schedule,
        passes: Passes,
        steps: Mapping[int, AdapterSteps],
        *,
        apply: Callable[[int], None],
        poll: Callable[[], None],
        clock: Clock,
        noop: DeviceBatch,
        vote: StopVote | None,
    ) -> None:
        self.schedule, self.passes = schedule, passes
        self._steps, self._apply, self._poll, self._clock = steps, apply, poll, clock
        self._noop, self._vote = noop, vote
        self._marks: list[tuple[str, int, int, Mark, Mark, bool]] = []
        self._empty: set[int] = set()
        self._first = 0
        self._mail: NormMail | None = None
        self._replayed = {(end.position, end.job) for end in schedule.replayed_ends if end.job in steps}
        self._backwards: Iterator[tuple[int, int]] = iter(())

    @property
    def cut(self) -> int | None:
        """First position that does not count any more, where the ranks agreed to stop within this window."""
        position = self._vote.position if self._vote else None
        return position if position is not None and position < len(self.passes.positions) else None

    def begin(self, first: int, count: int, chunks: int, mail: NormMail | None) -> None:
        """A pass over ``count`` positions from ``first`` on begins."""
        self._first, self._mail = first, mail
        self._backwards = ((chunk, first + position) for chunk, position in _backward_order(count, chunks))

    def rows(self, position: int, replica: Sequence[Any], multiple: int) -> int:
        """Rows of the microbatch at ``position`` of this pass on this rank's replica, a multiple of ``multiple``."""
        at = self._first + position
        microbatch = replica[self.passes.positions[at]]
        if microbatch.is_noop or (self.cut is not None and at >= self.cut):
            return self._noop.input_ids.shape[1]
        return int(microbatch.rows(self.schedule.padding_multiple, multiple))

    def num_ends(self, position: int) -> int:
        """How many steps end at ``position`` of this pass."""
        return len(self._ends(self._first + position))

    def numbered(self, batches: Iterator[DeviceBatch], chunk: int) -> Iterator[tuple[int, int, DeviceBatch]]:
        """(chunk, position, microbatch) of the positions that are run."""
        wanted = iter(self.passes.positions)
        number, next_wanted = 0, next(wanted, None)
        for at, batch in enumerate(batches):
            if at == next_wanted:
                yield chunk, number, batch
                number, next_wanted = number + 1, next(wanted, None)

    def forward_step(
        self, data_iterator: Iterator[tuple[int, int, DeviceBatch]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        """Megatron's ``forward_step_func``: steps that this microbatch reads are applied first."""
        chunk, position, batch = next(data_iterator)
        if self._vote is not None and chunk == 0:
            self._vote.at(position)
        if self.cut is not None and position >= self.cut:
            batch = self._noop
        if not batch.jobs:
            self._empty.add(position)
        if self._mail is not None and chunk == 0:
            for ended in self._mail.carried(position - self._first):
                self._settle(self._first + ended)
        for job, steps in self._steps.items():
            if steps.pending and (job in batch.jobs or steps.ready):
                self._apply(job)
        start = self._clock.mark()
        output = model(
            batch.input_ids,
            batch.position_ids,
            None,
            labels=batch.labels,
            packed_seq_params=batch.packed,
        )
        self._marks.append(("forward", position, chunk, start, self._clock.mark(), not batch.jobs))
        self._poll()
        return output, partial(self._loss, batch)

    def after_backward(self, start: Mark) -> None:
        """One backward is done on this stage: start the steps that end with it."""
        chunk, position = next(self._backwards)
        self._marks.append(("backward", position, chunk, start, self._clock.mark(), position in self._empty))
        if chunk != 0:  # the chunk nearest to the input is the last to run backward
            return
        for at, job in self._replayed:
            if at == self.passes.positions[position]:
                self._steps[job].discard_gradient()
        ends = () if self.cut is not None and position >= self.cut else self._ends(position)
        for end in ends:
            steps = self._steps[end.job]
            if steps.pending:  # no sample of this step was in this replica's share, so no forward applied the last
                self._apply(end.job)
            steps.end_step(end.step)
        if self._mail is not None and ends:
            self._mail.add(position - self._first, [_device(self._steps[end.job]).sums for end in ends])
            if self._mail.stage == 0:
                self._settle(position)

    def finish(self) -> None:
        """The pass is over: every stage learns the totals that no message carried."""
        if self._mail is not None:
            self._mail.collect()
            for ended in self._mail.left:
                self._settle(self._first + ended)

    def result(self, started: Mark, stopped: Mark) -> WindowResult:
        """Times of everything that ran; waits for the device."""
        marks = [started, stopped, *(mark for entry in self._marks for mark in entry[3:5])]
        begin, end, *times = self._clock.seconds(marks)
        spans = []
        for number, (kind, at, chunk, _, _, noop) in enumerate(self._marks):
            start, stop = times[2 * number : 2 * number + 2]
            position = self.passes.positions[at]
            spans.append(Span(kind=kind, position=position, chunk=chunk, start=start, stop=stop, noop=noop))
        cut = None if self.cut is None else self.passes.positions[self.cut]
        return WindowResult(spans=spans, started=begin, stopped=end, cut=cut)

    def _ends(self, position: int) -> Sequence[Any]:
        return self.schedule.ends_at.get(self.passes.positions[position], ())

    def _settle(self, position: int) -> None:
        """Give the steps that ended at ``position`` their totals."""
        assert self._mail is not None
        if self.cut is not None and position >= self.cut:
            return
        ends = self._ends(position)
        for end, total in zip(ends, self._mail.total(position - self._first) if ends else (), strict=True):
            steps = _device(self._steps[end.job])
            if steps.pending:
                steps.settle(total)

    def _loss(
        self, batch: DeviceBatch, per_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the weighted cross-entropy; each job's part is added to its step's loss."""
        weighted = per_token.view(-1).float() * batch.loss_weights
        routing = batch.packed.routing
        assert routing is not None
        for job, segment in zip(batch.jobs, routing.segments, strict=True):
            self._steps[job].shard.loss.add_(weighted.detach()[segment.start : segment.stop].sum())
        return weighted.sum(), torch.zeros((), dtype=torch.int, device=weighted.device), {}


def _device(steps: AdapterSteps) -> DeviceSteps:
    assert isinstance(steps, DeviceSteps)
    return steps


def _backward_order(num_microbatches: int, num_chunks: int) -> Iterator[tuple[int, int]]:
    """(chunk, position) of this stage's backwards in the order of Megatron's schedule."""
    if num_chunks == 1:
        return ((0, position) for position in range(num_microbatches))
    table = schedules.get_schedule_table(
        num_microbatches, num_chunks, parallel_state.get_pipeline_model_parallel_world_size()
    )
    return ((num_chunks - 1 - chunk, position) for position, chunk in table)


@contextmanager
def observed_backward(clock: Clock, after: Callable[[Mark], None]) -> Iterator[None]:
    """Call ``after(start)`` at the end of every backward step of Megatron's schedules."""
    original = schedules.backward_step

    def observed(*args: Any, **kwargs: Any) -> Any:
        start = clock.mark()
        gradient = original(*args, **kwargs)
        after(start)
        return gradient

    schedules.backward_step = observed
    try:
        yield
    finally:
        schedules.backward_step = original
