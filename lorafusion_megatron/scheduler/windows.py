"""Plans the next window in a process of its own while the last one trains."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.build import build_schedule
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.report import simulate_schedule
from lorafusion_megatron.types import GlobalBatch, Schedule

Batches = Sequence[Sequence[GlobalBatch]]


@dataclass(frozen=True)
class _Window:
    """A planned window."""

    schedule: Schedule
    speedup: float


def speedup(schedule: Schedule, batches: Batches, options: PlanOptions) -> float:
    """Predicted time of the same global batches one job after the other, over that of ``schedule``.

    Note: both are simulated; 0.2 s for 400 microbatches on 4 stages, while the window before trains.
    """
    if options.schedule == "sequential":
        return 1.0
    alone = replace(options, schedule="sequential")
    seconds = simulate_schedule(build_schedule(batches, alone), alone).seconds
    return seconds / simulate_schedule(schedule, options).seconds


def _plan(batches: Batches, options: PlanOptions) -> _Window:
    schedule = build_schedule(batches, options)
    return _Window(schedule, speedup(schedule, batches, options))


class WindowPlanner:
    """Makes schedules ahead of time, on one rank; the caller broadcasts them.

    `prepare` what the next window will probably be, train, then `take` what it is. Where jobs came or left in
    between, or the process has died, `take` plans on the spot: the schedule is the same either way, since planning is
    deterministic.

    Note: the process is started when there is first something to prepare, by ``spawn`` (a fork would copy a CUDA
    context); it takes no part in Ctrl-C, runs at lower priority, and ends by itself when its parent is gone, however
    that ended. A daemonic process may have no child: there every window is planned when it is taken.
    """

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._prepared: tuple[Batches, PlanOptions] | None = None
        self.waited_seconds = 0.0
        """How long the last `take` held its caller up."""
        self.speedup = 1.0
        """`speedup` of what the last `take` gave."""

    def __enter__(self) -> "WindowPlanner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def prepare(self, batches: Batches, options: PlanOptions) -> None:
        """Begin to plan a window; a plan that was prepared before and not taken is dropped.

        Where the process has died nothing is planned ahead this once; the next call starts another.
        """
        self._drop()
        if self._process is None and not current_process().daemon:
            self._start()
        if self._connection is None:
            return
        try:
            self._connection.send((batches, options))
        except OSError:
            self._give_up()
            return
        self._prepared = (batches, options)

    def take(self, batches: Batches, options: PlanOptions) -> Schedule:
        """The schedule of a window: the prepared one where it fits, else planned now.

        Args:
            batches: per job its global batches of the window, in step order.
            options: what it is planned for.

        Raises:
            UserError: as `build_schedule`.
        """
        started = time.perf_counter()
        prepared, self._prepared = self._prepared, None
        answer: _Window | UserError | None = None
        if prepared == (batches, options):
            answer = self._receive()
        elif prepared is not None:
            self._give_up()
        if isinstance(answer, UserError):
            raise answer
        window = answer or _plan(batches, options)
        self.speedup = window.speedup
        self.waited_seconds = time.perf_counter() - started
        return window.schedule

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self._process is None or self._connection is None:
            return
        self._connection.close()
        self._process.join(timeout=1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="window-planner", daemon=True)
        self._process.start()
        theirs.close()

    def _give_up(self) -> None:
        """End the process, dead or in the middle of a plan that nobody wants; the next `prepare` starts another."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _receive(self) -> _Window | UserError | None:
        """The process's answer; None where it has died."""
        assert self._connection is not None
        try:
            answer: _Window | UserError | None = self._connection.recv()
        except (OSError, EOFError):
            self._give_up()
            return None
        return answer

    def _drop(self) -> None:
        """Forget what was prepared and not taken."""
        if self._prepared is not None:
            self._prepared = None
            self._give_up()


def _serve(connection: Connection) -> None:
    """Plan what comes in until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    while True:
        try:
            batches, options = connection.recv()
        except (EOFError, OSError):
            return
        answer: object
        try:
            answer = _plan(batches, options)
        except UserError as error:
            answer = error
        except Exception:
            # A fault of the planner: the caller plans the same on the spot and fails there, with its own traceback.
            answer = None
        try:
            connection.send(answer)
        except OSError:
            return
