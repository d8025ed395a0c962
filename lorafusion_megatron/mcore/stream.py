"""Continuous 1F1B: one pass of Megatron's own schedule over a window of microbatches of many jobs and steps.

The schedule is data; this file only obeys it. Megatron's schedule asks for forwards through ``forward_step`` and
runs backwards through ``schedules.backward_step``, a module attribute that is observed while the pass runs: it is
told no microbatch number, so backwards are counted (1F1B finishes microbatches in order on every stage).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from ..types import Schedule, StepReport
from .clock import make_clock
from .device_steps import DeviceSteps
from .p2p import NormMail, PlannedCommunicator
from .steps import AdapterSteps
from .stop import StopVote
from .window import DeviceBatch, Span, Window, WindowResult, flushed, observed_backward, whole

__all__ = ["DeviceBatch", "Span", "StreamRunner", "WindowResult"]


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
        """Apply a job's pending step on this stage and tell of it; on a GPU its report follows later."""
        steps = self.steps[job]
        if isinstance(steps, DeviceSteps):
            steps.deliver = self._on_report
        report = steps.apply()
        if report is not None:
            self._on_report(report)
        # After the report: a copy of the adapter that is taken now is written with this step's loss.
        self._on_applied(job, steps.applied)

    def run(
        self,
        schedule: Schedule,
        batches: Callable[[], Iterator[DeviceBatch]],
        *,
        noop: DeviceBatch,
        vote: StopVote | None = None,
        flush: bool = False,
    ) -> WindowResult:
        """Train one window; every step that ends in it is applied on this stage when it returns.

        Args:
            schedule: the window.
            batches: makes an iterator over this replica's microbatches in order; called once a model chunk.
            noop: a no-op microbatch.
            vote: agrees on where to stop. From that position on only no-op microbatches run, so that the pipeline
                drains at once; steps that would end there are left out, and what their microbatches added to
                gradients is forgotten.
            flush: empty the pipeline after every optimizer step, as Megatron's own loop does, instead of filling the
                dependency distance with no-op microbatches. Interleaved schedules take whole groups of microbatches
                and are never flushed within a window.
        """
        flush = flush and len(self.chunks) == 1
        clock = make_clock(noop.input_ids.device)
        window = Window(
            schedule,
            flushed(schedule) if flush else whole(schedule),
            self.steps,
            apply=self.apply,
            poll=self._poll,
            clock=clock,
            noop=noop,
            vote=vote,
        )
        iterators = [window.numbered(batches(), chunk) for chunk in range(len(self.chunks))]
        started, first = clock.mark(), 0
        with observed_backward(clock, window.after_backward):
            for count in window.passes.lengths:
                self._pass(window, iterators, first, count)
                first += count
        stopped = clock.mark()
        for steps in self.steps.values():
            if window.cut is not None:
                steps.discard_gradient()
        result = window.result(started, stopped)
        self._poll(wait=True)
        for iterator in iterators:
            iterator.close()
        return result

    def _pass(self, window: Window, iterators: Sequence[Iterator[Any]], first: int, count: int) -> None:
        """One call of Megatron's schedule; steps that it leaves pending are applied."""
        group = parallel_state.get_pipeline_model_parallel_group()
        replica = window.schedule.replicas[parallel_state.get_data_parallel_rank()]
        mail = None
        if any(isinstance(steps, DeviceSteps) and steps.by_mail for steps in self.steps.values()):
            device = next(self.chunks[0].parameters()).device
            mail = NormMail(group, window.num_ends, device, num_microbatches=count, chunks=len(self.chunks))
        shards = self._row_shards()
        planned = self._planned(lambda position: window.rows(position, replica, shards), count, mail)
        window.begin(first, count, len(self.chunks), mail)
        get_forward_backward_func()(
            forward_step_func=window.forward_step,
            data_iterator=list(iterators) if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=count,
            seq_length=window.schedule.token_capacity,
            micro_batch_size=1,
            forward_only=False,
            **planned,
        )
        window.finish()
        for job, steps in self.steps.items():
            if steps.pending:
                self.apply(job)

    def _planned(self, rows: Callable[[int], int], count: int, mail: NormMail | None) -> dict[str, Any]:
        """What Megatron's schedules take so that messages have planned shapes.

        Args:
            rows: position -> rows of its microbatch.
            count: positions of the pass.
            mail: rides with the messages.
        """
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() == 1:
            return {}
        shards = self._row_shards()
        communicator = PlannedCommunicator(
            group,
            get_model_config(self.chunks[0]),
            rows=lambda position: rows(position) // shards,
            num_microbatches=count,
            chunks=len(self.chunks),
            mail=mail,
        )
        return {"p2p_communicator": communicator, "pg_collection": _process_groups()}

    def _row_shards(self) -> int:
        """Ranks among which sequence parallelism splits the rows of what stages send."""
        sequence_parallel = get_model_config(self.chunks[0]).sequence_parallel
        return parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1

    def _poll(self, *, wait: bool = False) -> None:
        """Hand on the reports of steps that were decided on the device."""
        for steps in self.steps.values():
            if isinstance(steps, DeviceSteps):
                for report in steps.reports(wait=wait):
                    self._on_report(report)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Callable[[], Iterator[DeviceBatch]],
        rows: Sequence[int],
        token_capacity: int,
        sums: dict[int, torch.Tensor],
    ) -> None:
        """Forward only: add each job's weighted cross-entropy on this rank (last stage; else nothing).

        Args:
            batches: makes an iterator over this replica's microbatches; called once a model chunk.
            rows: of each of them.
            token_capacity: rows of the largest.
            sums: job -> its sum so far.
        """

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
            num_microbatches=len(rows),
            seq_length=token_capacity,
            micro_batch_size=1,
            forward_only=True,
            **self._planned(rows.__getitem__, len(rows), None),
        )


def _process_groups() -> ProcessGroupCollection:
    """The groups that Megatron's schedules ask for beside the pipeline's."""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    return groups
