"""Which steps of which jobs the next window holds, and its plan."""

from collections.abc import Callable, Iterator

from ..mcore.parallel import Groups
from ..scheduler.windows import WindowPlanner
from ..types import GlobalBatch, Schedule
from .jobs import Job
from .roster import Roster
from .setup import Prepared
from .windows import least_tokens, window_shares


class NextWindow:
    """Plans windows of the jobs of a run, on rank 0 and in a process of its own.

    Args:
        prepared: the checked run.
        groups: this rank's groups.
        roster: the jobs as they come and go.
        note: told what the planner predicts.
    """

    def __init__(self, prepared: Prepared, groups: Groups, roster: Roster, note: Callable[[str], None]) -> None:
        self._prepared, self._groups, self._roster, self._note = prepared, groups, roster, note
        self._planner = WindowPlanner()

    def plan(self) -> Schedule | None:
        """The next window, made on rank 0, the same on all ranks; None where no job is left to train.

        While a window trains, a process of its own plans the one that follows if no job comes or leaves.
        """
        applied = {index: job.applied for index, job in self._roster.jobs.items()}
        batches = self._batches(applied)
        if not batches:
            return None
        schedule = None
        if self._groups.is_first:
            options = self._prepared.plan_options
            schedule = self._planner.take(batches, options)
            if options.schedule != "sequential":
                self._note(f"predicted {self._planner.speedup:.2f} times as fast as one job after the other")
            following = self._batches(applied | {job[-1].job: job[-1].step for job in batches})
            if following:
                self._planner.prepare(following, options)
        return self._groups.broadcast(schedule)

    def windows_left(self) -> int:
        """How many windows the running jobs still take, if none comes or leaves."""
        remaining, tokens = self._remaining({index: job.applied for index, job in self._roster.jobs.items()})
        windows = 0
        while remaining:
            shares = window_shares(remaining, tokens, self._window_tokens)
            remaining = {job: left - shares[job] for job, left in remaining.items() if left > shares[job]}
            windows += 1
        return windows

    def close(self) -> None:
        """End the planning process."""
        self._planner.close()

    def _batches(self, applied: dict[int, int]) -> list[list[GlobalBatch]]:
        """Per running job its global batches of the window that begins after ``applied`` steps; empty at the end.

        Ranks other than 0 only need to know whether there are any.
        """
        remaining, tokens = self._remaining(applied)
        jobs = {index: self._roster.jobs[index] for index in remaining}
        until_eval = {index: job.config.eval.steps_until_next(applied[index]) for index, job in jobs.items()}
        shares = window_shares(
            remaining, tokens, self._window_tokens, until_eval, least_tokens(self._prepared.plan_options)
        )
        out = []
        for index, job in jobs.items():
            assert job.source is not None
            done, count = applied[index], shares[index] if self._groups.is_first else 1
            out.append([job.source.batch(done + 1 + i) for i in range(count)])
        return out

    def _remaining(self, applied: dict[int, int]) -> tuple[dict[int, int], dict[int, float]]:
        """Per running job the steps that are left after ``applied``, and the mean tokens of a global batch."""
        jobs = {job.index: job for job in self._running() if applied[job.index] < job.num_steps}
        remaining = {index: job.num_steps - applied[index] for index, job in jobs.items()}
        return remaining, {index: _tokens_per_step(job) for index, job in jobs.items()}

    def _running(self) -> Iterator[Job]:
        return (job for job in self._roster.jobs.values() if job.status == "running")

    @property
    def _window_tokens(self) -> float:
        """Tokens that a window should hold, over all replicas."""
        runtime = self._prepared.run.runtime
        return float(runtime.max_window_microbatches * runtime.token_capacity * self._groups.dp_size)


def _tokens_per_step(job: Job) -> float:
    """Mean tokens of a job's global batch."""
    assert job.dataset is not None
    return float(job.dataset.lengths.mean()) * job.config.train.global_batch_size
