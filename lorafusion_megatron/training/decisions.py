"""What happens to jobs between two windows, on every rank: they end, come, pause, go on and leave."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config.build import Builder
from ..config.job import JobConfig
from ..mcore.parallel import Groups
from ..models.files import flush
from .checks import check_apart
from .jobs import Job
from .lifecycle import OPERATIONS, Inbox
from .new_jobs import NewJobs, check_room
from .rack import AdapterRack
from .resume import ADAPTER_FILES, lies_in_run
from .roster import Roster
from .saver import Saver
from .setup import Prepared


class Decisions:
    """Finds and carries out decisions about jobs.

    Args:
        prepared: the checked run.
        groups: this rank's groups.
        roster: the jobs.
        rack: their adapters.
        inbox: requests (rank 0 reads them).
        saver: writes adapters, from which a new job may start.
        note: told of every decision.
    """

    def __init__(
        self,
        prepared: Prepared,
        groups: Groups,
        roster: Roster,
        rack: AdapterRack,
        inbox: Inbox,
        saver: Saver,
        note: Callable[[str], None],
    ) -> None:
        self._prepared, self._groups, self._roster, self._rack = prepared, groups, roster, rack
        self._inbox, self._saver, self._note = inbox, saver, note
        self._new_jobs = NewJobs(prepared.run, prepared.spec, prepared.padding_multiple, note)

    def settle(self) -> None:
        """Give each mounted job the status that its last window and validation left it with."""
        for job in self._roster.jobs.values():
            if job.slot is not None and job.live:
                self._settle(job)

    def decide(self, window: int) -> tuple[list[dict[str, Any]], bool]:
        """What happens to jobs now, and whether to ask again since nothing else is left to do (rank 0)."""
        jobs = self._roster.jobs.values()
        last = not any(job.status == "running" for job in jobs if job.applied < job.num_steps)
        statuses = {job.name: job.status for job in jobs}
        events = self._inbox.decide(window, statuses, self._admit, last=last, hold=self._hold_start)
        return events, last and not events and self._inbox.waits

    def obey(self, event: dict[str, Any]) -> None:
        """Carry out one decision of rank 0, on every rank."""
        if event["op"] == "add":
            # It may start from the adapter of a job of this run: nobody writes that while the ranks read it.
            self._saver.drain()
            self._groups.broadcast(None)
            folder = self._roster.run.checkpoint.save / "inbox"
            job = self._roster.add(Builder(folder).section(JobConfig, event["job"], event["name"]))
            if job.slot is not None:
                self._note(f"{job.name} joins: {job.num_steps} steps")
            return
        job = next(job for job in self._roster.jobs.values() if job.name == event["name"])
        if job.status not in OPERATIONS[event["op"]]:  # it was added in the same breath, and could not be
            self._note(f"{event['op']} of {job.name} is left out: it is {job.status}")
            return
        if event["op"] == "resume":
            self._roster.resume(job)
        else:
            job.status, job.reason = ("paused" if event["op"] == "pause" else "cancelled"), "asked for"
        if event["op"] != "resume" or job.status == "running":
            self._note(f"{job.name} is {job.status} at step {job.applied}")

    def close(self) -> None:
        """End a check that is under way."""
        self._new_jobs.close()

    def _admit(self, config: JobConfig) -> bool:
        """Whether a new job is found good; False where that is not known yet."""
        if not self._new_jobs.check(config):
            return False
        check_apart(self._prepared.run.checkpoint.save, [*self._roster.names, config.name])
        if self._groups.device.type == "cuda":
            mounted = [job.config for job in self._roster.jobs.values() if job.slot is not None]
            room = torch.cuda.get_device_properties(self._groups.device).total_memory
            prepared = self._prepared
            check_room(prepared.run, prepared.spec, prepared.layers_per_chunk, mounted, config, room)
        return True

    def _hold_start(self, name: str, raw: dict[str, Any]) -> dict[str, Any]:
        """Where a new job starts from an adapter of this run, copy it: a resume that lets the job join again finds it.

        Raises:
            OSError: it can't be copied.
        """
        save = self._prepared.run.checkpoint.save
        start = Builder(save / "inbox").section(JobConfig, raw, name).peft.init_from
        if start is None or not lies_in_run(self._prepared.run, start):
            return raw
        self._saver.drain()  # what the window that ended has learnt
        held = Path(os.path.abspath(save / "inbox" / "starts" / name))
        held.mkdir(parents=True, exist_ok=True)
        for file in ADAPTER_FILES:
            shutil.copyfile(start / file, held / file)
            flush(held / file)
        return {**raw, "peft": {**raw["peft"], "init_from": str(held)}}

    def _settle(self, job: Job) -> None:
        steps = self._rack.steps[job.index]
        if steps.stopped:
            job.status = "stopped"
            job.reason = f"{steps.bad_steps} steps in a row without a finite gradient"
            self._note(f"{job.name} is stopped after step {job.applied}: {job.reason}; its last good adapter is kept")
        elif job.applied >= job.num_steps:
            job.status = "finished"
        elif job.out_of_patience():
            job.status = "finished"
            job.reason = f"no better validation loss {job.config.eval.patience} times in a row"
            self._note(f"{job.name} ends early at step {job.applied}: {job.reason}")
