"""Writing and finding what an exact resume needs; the files' form is `state`'s, the thread is `saver`'s."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..mcore.gather import Factors
from ..mcore.steps import StepCounters
from ..models.adapter import write_adapter
from ..types import AdapterSpec, ModelSpec
from .adapters import to_peft
from .jobs import Job
from .output import write_json
from .saver import PlanPosition, StateItem
from .sequences import sequences
from .state import StateWriter, drop_old

Note = Callable[[str], None]
EVAL_FILE = "eval.json"
"""Beside the best adapter: the step and the loss of the validation that found it."""


class CheckpointWriter:
    """Rank 0's side of saving: adapters, losses and states under the run's folder.

    A full disk is told and survived: the run goes on, and the last whole files stay.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Mapping[int, Job],
        adapter_of: Callable[[int], AdapterSpec],
        model: ModelSpec,
        base_model: Path,
        *,
        base: str | None = None,
        keep: int,
        keep_steps: bool,
        is_first: bool,
        note: Note,
    ) -> None:
        self.folder, self._jobs, self._adapter_of = folder, jobs, adapter_of
        # PEFT and `export` look the path up from wherever they run.
        self._model, self._base_model = model, Path(os.path.abspath(base_model))
        self._base = base
        self._keep, self._keep_steps, self._is_first, self._note = keep, keep_steps, is_first, note
        self._written: dict[int, int] = {}
        """Job -> step of the adapter that was written last by this process."""
        self._kept: dict[int, set[int]] = {}
        """Job -> steps that this process kept."""
        self.last_state: str | None = None
        self.state_failed = False
        """Whether the newest checkpoint could not be written (rank 0; the saving thread must be idle)."""

    def adapter(self, job: int, step: int, factors: Factors, best: bool, keep: bool = True) -> None:
        """Write a job's adapter and its losses up to ``step``; also as a kept step, where the run keeps some."""
        entry, spec = self._jobs[job], self._adapter_of(job)
        folder = self.folder / entry.name
        tensors = to_peft(factors, self._model)
        try:
            if best:
                (folder / "best" / EVAL_FILE).unlink(missing_ok=True)  # never beside another step's adapter
                write_adapter(folder / "best", spec, self._base_model, tensors)
                write_json(folder / "best" / EVAL_FILE, {"step": step, "loss": dict(entry.evals).get(step)})
                shutil.rmtree(folder / f"best_step_{step}", ignore_errors=True)
                return
            write_adapter(folder, spec, self._base_model, tensors)
            write_json(folder / "losses.json", entry.losses[:step])
            if self._keep_steps and keep:
                write_adapter(folder / f"step_{step}", spec, self._base_model, tensors)
                self._kept.setdefault(job, set()).add(step)
            self._written[job] = step
        except OSError as error:
            self._note(f"{entry.name}: the adapter of step {step} could not be saved ({error}); the run goes on")
            return
        if self._keep_steps and keep:
            try:
                _drop_old_steps(folder, self._keep, self._kept[job])
            except OSError as error:
                self._note(f"{entry.name}: an old adapter could not be removed ({error}); the run goes on")

    def roll_back(self) -> None:
        """At a resume (rank 0): set a best adapter aside that is of a validation which the checkpoint does not know.

        Training goes on from before it. Where it comes out the same, that validation writes it again; where it does
        not, ``best/`` would be no adapter of this training.
        """
        for job in self._jobs.values():
            best = self.folder / job.name / "best"
            try:
                step = json.loads((best / EVAL_FILE).read_text())["step"]
                if step in dict(job.evals):
                    continue
                aside = best.with_name(f"best_step_{step}")
                shutil.rmtree(aside, ignore_errors=True)
                best.rename(aside)
            except (OSError, ValueError, KeyError, TypeError):  # there is none, or none that says what it is
                continue
            self._note(f"{job.name}: {best} is of step {step}, which is trained again: kept as {aside.name}")
            self.evals(job)

    def evals(self, job: Job) -> None:
        """Write the validation losses of a job."""
        try:
            write_json(self.folder / job.name / "evals.json", [{"step": s, "loss": v} for s, v in job.evals])
        except OSError as error:
            self._note(f"{job.name}: its validation losses could not be saved ({error}); the run goes on")

    def has_last(self, job: Job) -> bool:
        """Whether the adapter of a job's newest step was written (rank 0; the saving thread must be idle)."""
        return self._written.get(job.index) == job.applied

    def state(self, item: StateItem) -> None:
        """Write a checkpoint; every rank walks through its jobs, rank 0 writes."""
        folder = self.folder / "state"
        writer: StateWriter | None = None
        counters: dict[int, StepCounters] = {}
        failure: str | None = None  # an error would keep this frame, and the item's copies, in a cycle
        for job, counts, parts in item.jobs():
            counters[job] = counts
            if parts is None or failure is not None:
                continue
            try:
                writer = writer or self._open(folder)
                writer.job(self._jobs[job].name, parts)
            except OSError as error:
                failure = str(error)
        if not self._is_first:
            return
        try:
            if failure is not None:
                raise OSError(failure)
            writer = writer or self._open(folder)
            schedule = item.where.schedule
            inside = schedule is not None and item.cut < schedule.num_microbatches
            if schedule is not None and inside:
                writer.schedule(schedule)
            self.last_state = str(writer.commit(self._manifest(item.where, inside, counters)))
            self.state_failed = False
        except OSError as error:
            self.state_failed = True
            if writer is not None:
                writer.discard()
            kept = self.last_state or "none"
            self._note(f"a checkpoint could not be saved ({error}); the run goes on, the last whole one is {kept}")
            return
        try:
            drop_old(folder, self._keep)
        except OSError as error:
            self._note(f"an old checkpoint could not be removed ({error}); the run goes on")

    def _open(self, folder: Path) -> StateWriter:
        return StateWriter(folder, next(iter(sequences(folder)), 0) + 1)

    def _manifest(self, where: PlanPosition, inside: bool, counters: Mapping[int, StepCounters]) -> dict[str, Any]:
        jobs = []
        for index, (status, reason) in where.statuses.items():
            evals = where.evals.get(index)
            record, known = self._jobs[index].record(evals=evals), counters.get(index)
            if known is not None:
                record = self._jobs[index].record(known.applied, status=status, reason=reason, evals=evals)
                if known.stopped:
                    record |= {"status": "stopped", "reason": "its gradient was not finite"}
            jobs.append({**record, "counters": asdict(known) if known else None})
        shape, events = dict(where.shape), list(where.events)
        manifest = {"window": where.window, "events": events, "inside": inside, "shape": shape, "jobs": jobs}
        return manifest if self._base is None else manifest | {"base": self._base}


def _drop_old_steps(folder: Path, keep: int, mine: Collection[int]) -> None:
    """Keep the ``keep`` step folders that were written last; an earlier run in the folder may have got further.

    Args:
        folder: the job's folder.
        keep: how many stay.
        mine: steps that this process wrote: newer than all others, whatever the clock says.
    """
    numbered = ((int(p.name[5:]), p) for p in folder.glob("step_*") if p.name[5:].isdigit())
    steps = sorted((step in mine, step if step in mine else p.stat().st_mtime_ns, step, p) for step, p in numbered)
    for *_, path in steps[:-keep]:
        shutil.rmtree(path)
