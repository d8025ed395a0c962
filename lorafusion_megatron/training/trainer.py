"""The loop: decide, validate, plan a window, run it through Megatron's schedule, save on the side."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.run import RunConfig
from ..errors import UserError
from ..mcore.clock import seconds_ahead
from ..mcore.parallel import Groups
from ..mcore.rehearsal import rehearse
from ..mcore.stop import StopVote, anyone
from ..mcore.stream import StreamRunner
from ..models.checkpoint import check_base_weights, weights_fingerprint
from ..scheduler.trim import trim_schedule
from ..types import Schedule, StepReport
from .batches import BatchMaker
from .checkpoints import CheckpointWriter
from .decisions import Decisions
from .evaluate import Validator
from .garbage import Collector
from .jobs import Job
from .lifecycle import Inbox
from .lock import lock_folder, unlock_folder
from .loggers import Loggers
from .next_window import NextWindow
from .output import MetricsLog
from .prefetch import prefetch
from .progress import Progress
from .rack import AdapterRack, InjectedModel, build_model
from .report import RunReport
from .resume import find_resume, lies_in_run, start_afresh
from .roster import Roster
from .saver import MAX_WAITING, PlanPosition, SaveItem, Saver, plan_saves
from .setup import Prepared
from .signals import Stop

REHEARSED = {"cuda"}
"""Devices whose first microbatch is rehearsed: where its kernels are compiled at their first call."""


class Trainer:
    """All jobs of a run on this rank. Every rank makes one and calls `train`.

    Args:
        prepared: the checked run.
        groups: this rank's process groups.
        progress: where steps and windows are shown (rank 0).
        stop: whether a signal asked to stop.
        model: this rank's model; None: built as the run says.
        resume_from: state folder to begin from; None: the run's own.
    """

    def __init__(
        self,
        prepared: Prepared,
        groups: Groups,
        progress: Progress,
        stop: Stop,
        *,
        model: InjectedModel | None = None,
        resume_from: Path | None = None,
    ) -> None:
        self.prepared, self.groups, self.progress, self.stop = prepared, groups, progress, stop
        self.folder = Path(prepared.run.checkpoint.save)
        self._first(lambda: lock_folder(self.folder, progress.note))
        self.rack = AdapterRack(prepared, groups, model or build_model(prepared, groups))
        self.runner = StreamRunner(
            self.rack.chunks, self.rack.steps, on_applied=self._on_applied, on_report=self._on_report
        )
        self.stopped = False
        """Whether the ranks agreed to stop; the state is saved then."""
        self.unsaved: list[str] = []
        """Ended jobs whose last adapter could not be written yet; they stay on the model."""
        self.unsaved_state = False
        """Whether the last checkpoint could not be written."""
        self._rehearsed = False
        self._unsaved_steps = 0
        """Steps of all jobs since the last checkpoint."""
        base = self._first(lambda: weights_fingerprint(check_base_weights(prepared.run.base_model.path, prepared.spec)))
        resumed = find_resume(
            prepared.run, prepared.spec, groups, self._shape(), progress.note, base=base, source=resume_from
        )
        self.window, self._left = resumed.window, resumed.schedule
        self.roster = Roster(prepared, groups, self.rack, resumed, progress.note)
        if self._left is not None and not self.roster.still_plans(self._rest(self._left)):
            progress.note("data, order, length or validations of a job changed: the rest of its window is planned anew")
            self.window, self._left = self.window + 1, None
        self.loggers: Loggers | None = self._first(
            lambda: Loggers(self.run, resumed=resumed.path is not None, note=progress.note)
        )
        if resumed.path is None:
            self._first(lambda: start_afresh(prepared.run, progress.note))
        self.report = RunReport(
            self.folder,
            groups,
            progress,
            self.jobs,
            prepared.layers_per_chunk,
            prepared.spec,
            seconds_ahead(groups),
        )
        self.metrics = MetricsLog(self.folder, resumed.applied_by_name(), progress.note) if groups.is_first else None
        self.inbox = Inbox(self.folder, progress.note, carried_out=resumed.events, held_window=resumed.held_window)
        self.writer = CheckpointWriter(
            self.folder,
            self.jobs,
            self.roster.adapter_spec,
            prepared.spec,
            self.run.base_model.path,
            base=base,
            keep=self.run.checkpoint.keep,
            keep_steps=self.run.checkpoint.save_interval is not None,
            is_first=groups.is_first,
            note=progress.note,
        )
        self.writer.last_state = str(resumed.path) if resumed.path else None
        if resumed.path is not None and groups.is_first:
            self.writer.roll_back()
        self.saver = Saver(groups, write_adapter=self.writer.adapter, write_state=self.writer.state)
        self.decisions = Decisions(prepared, groups, self.roster, self.rack, self.inbox, self.saver, progress.note)
        self.next_window = NextWindow(prepared, groups, self.roster, progress.note)
        self.batches = BatchMaker(prepared, groups, self.roster)
        self.validator = Validator(self.runner, self.batches, groups, prepared.plan_options)
        self.collector = Collector(active=groups.device.type == "cuda")
        begins = [job for job in self.jobs.values() if job.slot is not None and resumed.counters(job.index) is None]
        if any(lies_in_run(self.run, job.config.peft.init_from) for job in begins):
            # They, or the jobs whose adapters those are, write there: no later start may read that again.
            self._save_state(self._left)
            self.saver.drain()
        self._report_status("running")

    @property
    def run(self) -> RunConfig:
        """The run with every job so far."""
        return self.roster.run

    @property
    def jobs(self) -> dict[int, Job]:
        """Index -> job."""
        return self.roster.jobs

    def train(self) -> bool:
        """Train until every job has ended or a signal asks to stop.

        Returns:
            Whether every job ended.
        """
        while not self.stopped and self.advance():
            pass
        self.finish(complete=not self.stopped)
        return not self.stopped

    def advance(self) -> bool:
        """Run the next window; False where no job is left to train."""
        while True:
            released = self._left is None and self._between_windows()
            schedule = None if self.stopped else self._left or self.next_window.plan()
            if schedule is not None:
                break
            # Their last adapters may have taken a while to write.
            asked = self.groups.broadcast(self.inbox.unanswered(new=True) if self.groups.is_first else None)
            if self.stopped or not asked:
                return False
        self.collector.before_window(released=released)
        self.stopped = self._run_window(schedule)
        return True

    def settle(self) -> None:
        """Do what is due between two windows, as `advance` does first: validations, requests, jobs that leave."""
        if self._left is None and not self.stopped:
            self._between_windows()

    def checkpoint(self) -> str | None:
        """Save the state between two windows and wait for it; the checkpoint's folder on rank 0.

        After a stop within a window the state is saved already, as it was there.
        """
        if not self.stopped:
            self._save_state(None)
        self.saver.drain()
        return self.writer.last_state

    def finish(self, *, complete: bool) -> None:
        """Wait until everything is written, and end. ``complete``: whether every job ended."""
        if complete:
            self._release()
            self.report.left_over(self.inbox.unanswered() if self.groups.is_first else [])
        self.checkpoint()
        self.unsaved_state = self.groups.broadcast(self.writer.state_failed)
        self._write_adapters([job for job in self.jobs.values() if job.slot is not None and job.applied], keep=False)
        self.saver.finish()
        self._close(not complete or bool(self.unsaved))

    # ------------------------------------------------------------------ windows

    def _run_window(self, schedule: Schedule) -> bool:
        """Run one window, or what a resume left of it; True where the ranks agreed to stop."""
        applied = {index: steps.applied for index, steps in self.rack.steps.items()}
        self._left = None
        rest = self._rest(schedule)
        if not rest.num_microbatches:
            self.window += 1
            return False
        where = self._position(schedule)
        skipped = schedule.num_microbatches - rest.num_microbatches
        num_steps = {index: job.num_steps for index, job in self.jobs.items()}
        items, self._unsaved_steps = plan_saves(
            rest, applied, num_steps, self._save_interval(), where, self._unsaved_steps
        )
        for item in items:
            item.cut = None if item.cut is None else item.cut + skipped
        self.saver.expect(items)
        for index in self.rack.steps:
            self._offer(index)
        self.progress.window(rest, self.roster.names)
        self._rehearse(rest, applied)
        interval = 2 * self.prepared.topology.pipeline_parallel * len(self.rack.chunks)
        vote = StopVote(
            self.groups,
            self.stop.wished,
            lead=interval,
            interval=interval,
            behind=lambda: self.groups.is_first and self.saver.is_behind,
            leave_out=lambda first, last: self._tell_behind(self.saver.leave_out(first + skipped, last + skipped)),
        )
        result = self.runner.run(
            rest,
            lambda: prefetch(self.batches.training(rest, applied), self.groups.device),
            noop=self.batches.noop(),
            vote=vote,
            flush=self.run.runtime.schedule == "sequential",
        )
        stopped = vote.finish()
        self.saver.close_window()
        self.report.window(rest, result)
        if result.cut is None:
            self.window += 1
        if stopped:
            self._save_state(None if result.cut is None else schedule)
        self._report_status("running")
        return stopped

    def _save_interval(self) -> int | None:
        """Steps between saves in the next window; None: none but at the end of jobs, where the disk can't follow."""
        interval = self.run.checkpoint.save_interval
        if interval is not None and self.groups.broadcast(self.saver.is_behind if self.groups.is_first else None):
            self._tell_behind(1)
            return None
        return interval

    def _tell_behind(self, left_out: int) -> None:
        if left_out:
            self.progress.note(
                f"{MAX_WAITING} checkpoints or more wait to be written: the next one is left out. Check the disk under "
                f"{self.folder}, or raise checkpoint.save_interval"
            )

    def _rehearse(self, schedule: Schedule, applied: dict[int, int]) -> None:
        """Before the first window on GPUs: compile and measure kernels on all stages at once."""
        if self._rehearsed or self.groups.device.type not in REHEARSED:
            return
        self._rehearsed = True
        first = next((batch for batch in self.batches.training(schedule, applied) if batch.jobs), None)
        if first is None:  # this replica's share is empty
            return
        rehearse(self.rack.chunks, first.to(self.groups.device)[0], self.rack.steps.values())

    def _between_windows(self) -> bool:
        """What happens with the pipeline empty: jobs come and go, adapters are validated, ended jobs leave.

        Returns:
            Whether any left.
        """
        if not self._evaluate():
            self._stop_here()
            return False
        self.decisions.settle()
        waits = True
        while waits:
            if anyone(self.groups, wished=self.stop.wished()):
                self._stop_here()
                return False
            events, waits = self.groups.broadcast(self.decisions.decide(self.window) if self.groups.is_first else None)
            for event in events:
                self.decisions.obey(event)
            if waits:
                time.sleep(1.0)
        return self._release()

    def _stop_here(self) -> None:
        """The ranks agreed to stop between two windows."""
        self._save_state(None)
        self.stopped = True

    def _release(self) -> bool:
        """Take ended jobs off the model once their last adapter is written; whether there were any."""
        ended = [job for job in self.jobs.values() if job.slot is not None and not job.live]
        if not ended:
            return False
        self._write_adapters(ended)
        self.unsaved = self.groups.broadcast([job.name for job in ended if not self.writer.has_last(job)])
        for job in ended:
            if job.name not in self.unsaved:
                self.rack.unmount(job)
                job.let_go()
        return True

    def _write_adapters(self, jobs: list[Job], *, keep: bool = True) -> None:
        """Write the adapters of jobs as they are now, where their newest step has none yet, and wait for all saves."""
        self.saver.drain()
        unwritten = self.groups.broadcast([job.index for job in jobs if not self.writer.has_last(job)])
        self._save([SaveItem(wants={index: self.jobs[index].applied}, keep=keep) for index in unwritten])
        self.saver.drain()

    # ------------------------------------------------------------------ steps

    def _on_applied(self, index: int, step: int) -> None:
        """A job's step was applied on this stage."""
        self.jobs[index].applied = step
        self._offer(index)

    def _offer(self, index: int) -> None:
        steps = self.rack.steps[index]
        self.saver.offer(index, steps.applied, self.rack.shards[index], steps.snapshot)

    def _on_report(self, report: StepReport) -> None:
        """What a job's step did is known."""
        job = self.jobs[report.job]
        job.losses.append(report.loss)
        if self.metrics and self.loggers and job.source is not None:
            report = replace(report, extra={**report.extra, **self.report.speed})
            counts = job.source.counts(report.step)
            self.metrics.step(report, name=job.name, **counts)
            self.loggers.step(report, name=job.name, **counts)
            self.progress.step(report, name=job.name, total=job.num_steps, tokens=counts["tokens"])

    def _evaluate(self) -> bool:
        """Validate the jobs that are due, with the pipeline empty; False where a rank wished to stop meanwhile."""
        due = {i: j.eval_dataset for i, j in self.jobs.items() if j.slot is not None and j.eval_due()}
        datasets = {index: dataset for index, dataset in due.items() if dataset is not None}
        if not datasets:
            return True
        losses = self.validator.losses(datasets, self.stop.wished)
        if losses is None:
            return False
        best = []
        for index, loss in losses.items():
            job = self.jobs[index]
            job.evals.append((job.applied, loss))
            is_best = job.best_eval() == (job.applied, loss) and math.isfinite(loss)
            self.progress.note(
                f"{job.name} step {job.applied}: validation loss {loss:.4f}{' (best)' if is_best else ''}"
            )
            if self.loggers:
                self.loggers.evaluation(job.name, job.applied, loss)
                self.writer.evals(job)
            if is_best:
                best.append(SaveItem(wants={index: job.applied}, best=True))
        self._save(best)
        return True

    # ------------------------------------------------------------------ jobs and state

    def _save_state(self, schedule: Schedule | None) -> None:
        """Queue a checkpoint of everything as it is now: inside ``schedule``, or between windows."""
        where = self._position(schedule)
        if schedule is None:
            where = replace(where, window=self.window - 1)
        wants = {index: steps.applied for index, steps in self.rack.steps.items()}
        item = SaveItem(wants=wants, cut=0, where=where)
        if not wants:
            item.ready.set()
        self._save([item])

    def _save(self, items: list[SaveItem]) -> None:
        """Queue what is to be saved as it is now, between two windows."""
        self.saver.expect(items)
        for index in {job for item in items for job in item.wants}:
            self._offer(index)
        self.saver.close_window()

    def _position(self, schedule: Schedule | None) -> PlanPosition:
        return PlanPosition(
            window=self.window,
            events=tuple(sorted(self.inbox.carried_out)),
            schedule=schedule,
            shape=self._shape(),
            statuses={index: (job.status, job.reason) for index, job in self.jobs.items()},
            evals={index: len(job.evals) for index, job in self.jobs.items()},
        )

    def _shape(self) -> dict[str, Any]:
        """What a schedule is made for: one that was made for another shape is not gone on with."""
        options = self.prepared.plan_options
        names = ("stages", "virtual_stages", "replicas", "token_capacity", "padding_multiple", "schedule")
        return {name: getattr(options, name) for name in names}

    def _rest(self, schedule: Schedule) -> Schedule:
        """What is left of a window."""
        applied = {index: job.applied for index, job in self.jobs.items()}
        stages = self.prepared.topology.pipeline_parallel if len(self.rack.chunks) > 1 else 1
        return trim_schedule(schedule, applied, multiple=stages)

    def _report_status(self, state: str) -> None:
        self.report.status(state, window=self.window, last_checkpoint=self.writer.last_state)

    def _first[Made](self, make: Callable[[], Made]) -> Made | None:
        """Do something on rank 0; what a user can mend is raised on every rank."""
        made, error = None, None
        try:
            made = make() if self.groups.is_first else None
        except UserError as found:
            error = found
        if (error := self.groups.broadcast(error)) is not None:
            raise error
        return made

    def _close(self, stopped: bool) -> None:
        self.next_window.close()
        self.decisions.close()
        self.collector.close()
        self.report.timeline()
        self._report_status("stopped" if stopped else "done")
        if self.metrics and self.loggers:
            self.metrics.close()
            self.loggers.close()
            unlock_folder(self.folder)
