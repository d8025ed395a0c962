"""Adapters and checkpoints leave the ranks on a side thread while the pipeline goes on.

What is to be saved in a window is known from its schedule, in one order on every rank. A rank fills an item with
copies of the flat buffers (made on the device) as its steps are applied; the saving thread takes the items in order,
gathers the shards on rank 0 over a group of its own, and rank 0 writes. The pipeline neither drains nor waits.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..lora.bank import AdapterShard
from ..mcore.gather import FactorGatherer, Factors
from ..mcore.parallel import Groups
from ..mcore.steps import StepCounters, StepSnapshot
from ..types import Schedule
from .state import PARTS

MAX_WAITING = 2
"""Checkpoints that may wait for the disk, the oldest of them for `PATIENCE_SECONDS`; with as many, no further ones are
made until one is written."""
PATIENCE_SECONDS = 20.0
"""Time in which a disk that works writes several checkpoints that came close together."""


@dataclass(frozen=True, kw_only=True)
class PlanPosition:
    """Where in the plan a checkpoint lies."""

    window: int
    """Number of the window, from 0; the last one that is done, where the checkpoint lies between windows (-1: none)."""
    schedule: Schedule | None
    """That window, if the checkpoint may lie inside; None between windows."""
    shape: Mapping[str, Any]
    """What the schedule was made for; a run of another shape makes its own."""
    statuses: Mapping[int, tuple[str, str]]
    """Job -> its status and the reason when the window began; jobs come and go between windows alone."""
    evals: Mapping[int, int] = field(default_factory=dict)
    """Job -> its validations so far. Later ones are made again: their best adapters may not be written yet."""
    events: tuple[int, ...] = ()
    """Decisions about jobs that had taken effect then, by id (rank 0)."""


@dataclass(kw_only=True)
class SaveItem:
    """One thing to save: the adapter of one job at one step, or the state of all jobs at a cut of the stream.

    A cut at position p is the state in which every step that ends before p is done and nothing after it has begun to
    count; no rank is ever in that state as a whole, but each job is in its part of it at some time.
    """

    wants: dict[int, int]
    """Job -> the step after which its copy is taken."""
    cut: int | None = None
    """None: an adapter. Otherwise the position of the cut; the number of microbatches where the window is done."""
    where: PlanPosition | None = None
    """Of a cut."""
    best: bool = False
    """Whether this adapter has the best validation loss of its job so far."""
    keep: bool = True
    """Whether this adapter is one of the kept steps too, where the run keeps some."""
    got: dict[int, tuple[AdapterShard, StepSnapshot]] = field(default_factory=dict)
    ready: threading.Event = field(default_factory=threading.Event)
    dropped: bool = False

    def fill(self, job: int, shard: AdapterShard, snapshot: StepSnapshot) -> None:
        """Take one job's copy and the shard that knows its layout."""
        self.got[job] = (shard, snapshot)
        if len(self.got) == len(self.wants):
            self.ready.set()


class Copy(Protocol):
    """Copies one job's state on this rank."""

    def __call__(self, *, moments: bool) -> StepSnapshot: ...


def plan_saves(
    schedule: Schedule,
    applied: Mapping[int, int],
    num_steps: Mapping[int, int],
    interval: int | None,
    where: PlanPosition,
    since: int = 0,
) -> tuple[list[SaveItem], int]:
    """What a window saves, in order.

    Args:
        schedule: the window.
        applied: job -> steps done before it, for every job whose state belongs to a checkpoint.
        num_steps: job -> its optimizer steps, for the jobs of the window.
        interval: optimizer steps of a job between two kept adapters; a checkpoint of the state comes after as many
            steps of an average job of the window. None: an adapter at the end of each job alone, as where saving is
            behind.
        where: of the checkpoints in this window.
        since: steps of all jobs that windows before it have done since the last checkpoint.

    Returns:
        The items, and the steps since the last checkpoint when the window is done.
    """
    items: list[SaveItem] = []
    current = dict(applied)
    every = (interval or 0) * max(1, len({end.job for end in schedule.step_ends}))
    for position, ends in sorted(schedule.ends_at.items()):
        for end in ends:
            current[end.job] = end.step
            since += 1
            if end.step == num_steps[end.job] or (interval and end.step % interval == 0):
                items.append(SaveItem(wants={end.job: end.step}))
        if interval and since >= every:
            items.append(SaveItem(wants=dict(current), cut=position + 1, where=where))
            since = 0
    return items, since


class Saver:
    """The saving thread of a rank.

    Args:
        groups: this rank's groups.
        write_adapter: rank 0: (job, step, whole factors, whether it is the best one, whether its step is kept).
        write_state: every rank: walks through a checkpoint's jobs; rank 0 writes.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        write_adapter: Callable[[int, int, Factors, bool, bool], None],
        write_state: Callable[["StateItem"], None],
    ) -> None:
        self._gatherer = FactorGatherer(groups)
        self._write_adapter, self._write_state = write_adapter, write_state
        self._queue: queue.Queue[SaveItem | None] = queue.Queue()
        self._open: list[SaveItem] = []
        self._waiting: dict[int, float] = {}
        """Checkpoints whose copies are made and not written yet -> since when, by `time.monotonic`."""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
        self._thread.start()

    @property
    def is_behind(self) -> bool:
        """Whether checkpoints wait so long that no more should be made: each holds copies on the device."""
        waiting = list(self._waiting.values())
        return len(waiting) >= MAX_WAITING and time.monotonic() - min(waiting) >= PATIENCE_SECONDS

    def expect(self, items: Sequence[SaveItem]) -> None:
        """Queue what the next window saves; the same on every rank."""
        self.check()
        self._open += items
        for item in items:
            self._queue.put(item)

    def offer(self, job: int, step: int, shard: AdapterShard, copy: Copy) -> None:
        """A job has just done ``step`` (or begins a window with it): one copy serves everything that wants it.

        Args:
            job, step: that step.
            shard: the job's shard on this rank.
            copy: makes the copy, with the moments where a checkpoint wants it.
        """
        wanting = [item for item in self._open if job not in item.got and item.wants.get(job) == step]
        if wanting:
            snapshot = copy(moments=any(item.cut is not None for item in wanting))
            for item in wanting:
                # Before the last copy makes it ready: the thread may have written it right after.
                if item.cut is not None and len(item.got) + 1 == len(item.wants):
                    self._waiting[id(item)] = time.monotonic()
                item.fill(job, shard, snapshot)

    def leave_out(self, first: int, last: int) -> int:
        """Make no checkpoint whose cut lies right after one of these positions, on every rank alike; how many.

        No rank may have come to them: what they hold of jobs whose steps ended before is let go of.
        """
        left_out = [item for item in self._open if item.cut is not None and first < item.cut <= last + 1]
        for item in left_out:
            assert not item.ready.is_set(), "a checkpoint is left out before any rank has come to its place"
            self._open.remove(item)
            _drop(item)
        return len(left_out)

    def close_window(self) -> None:
        """The window is over: what a stop kept from being filled is dropped, the same on every rank."""
        for item in self._open:
            if not item.ready.is_set():
                _drop(item)
        self._open.clear()

    def drain(self) -> None:
        """Wait until everything queued so far is written."""
        self._queue.join()
        self.check()

    def finish(self) -> None:
        """Wait until everything is written and end the thread."""
        self._queue.put(None)
        self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise what went wrong on the thread (a lost rank; a full disk is told, not raised)."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while self._next():
            pass

    def _next(self) -> bool:
        """Save the next item; False where the thread ends instead."""
        item = self._queue.get()
        more = item is not None
        try:
            if item is not None:
                item.ready.wait()
                if not item.dropped and self._error is None:
                    self._save(item)
        except BaseException as error:
            self._error = error
        finally:
            self._waiting.pop(id(item), None)
            del item  # before `drain` returns: its copies must not outlive a job that leaves
            self._queue.task_done()
        return more

    def _save(self, item: SaveItem) -> None:
        if item.cut is not None:
            self._write_state(StateItem(item, self._gatherer))
            return
        ((job, step),) = item.wants.items()
        shard, snapshot = item.got[job]
        factors = self._gatherer.adapter(shard)(snapshot.master, snapshot.ready)
        if factors is not None:
            self._write_adapter(job, step, factors, item.best, item.keep)


def _drop(item: SaveItem) -> None:
    item.dropped = True
    item.ready.set()
    item.got.clear()


class StateItem:
    """A checkpoint on its way: every rank walks through the jobs, rank 0 receives whole factors.

    All jobs are walked through whatever happens to the file, since the other ranks take part in gathering them.
    """

    def __init__(self, item: SaveItem, gatherer: FactorGatherer) -> None:
        assert item.where is not None
        assert item.cut is not None
        self.cut, self.where = item.cut, item.where
        self._got, self._gatherer = item.got, gatherer

    def jobs(self) -> Iterator[tuple[int, StepCounters, dict[str, Factors] | None]]:
        """(job, its counts, part -> whole factors on rank 0), by job."""
        for job, (shard, snapshot) in sorted(self._got.items()):
            gather = self._gatherer.adapter(shard)
            parts = {part: gather(getattr(snapshot, part), snapshot.ready) for part in PARTS}
            whole = {part: factors for part, factors in parts.items() if factors is not None}
            yield job, snapshot.counters, whole or None
