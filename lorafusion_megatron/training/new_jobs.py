"""Whether a job that wants to join can be trained; large data is read in a process of its own, so that nobody waits.

Its rows are in the run's `row_cache` then, from which all ranks take them.
"""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from ..config.job import JobConfig
from ..config.run import RunConfig
from ..errors import UserError
from ..types import ModelSpec
from .checks import check_dataset, check_run
from .initial import check_initial_adapters
from .inputs import PARTS, load_rows, row_cache
from .memory import predict_run_memory

LARGE = 8 << 20
"""Bytes of a job's data up to which it is checked on the spot: about a second, in which all ranks wait."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job that wants to join, as a run of its own."""

    run: RunConfig
    spec: ModelSpec
    padding_multiple: int

    def check(self) -> None:
        """Raise where this model or machine can't train it.

        Raises:
            UserError: what is wrong with it.
        """
        kept = row_cache(self.run, write=True)
        try:
            check_run(self.run, self.spec)
            for part in PARTS:
                rows = load_rows(self.run, 0, part, kept, vocab_size=self.spec.vocab_size)
                if rows is not None:
                    check_dataset(self.run, self.spec, 0, rows, padding_multiple=self.padding_multiple, section=part)
            check_initial_adapters(self.run, self.spec)
        except UserError as error:
            kept.discard()
            key = error.key.removeprefix("jobs[0].")
            raise UserError(error.given, rule=error.rule, remedy=error.remedy, key=key) from None

    @property
    def data_bytes(self) -> int:
        """Size of the files that it reads."""
        job = self.run.jobs[0]
        paths = [path for path in (job.dataset.path, job.eval.path) if path is not None]
        return sum(os.path.getsize(path) for path in paths if os.path.exists(path))


class NewJobs:
    """Checks new jobs on rank 0, one large one at a time.

    Args:
        run: the run file.
        spec: its base model.
        padding_multiple: rows that a job's part of a microbatch is padded to.
        note: told when a job's check takes its time.
    """

    def __init__(self, run: RunConfig, spec: ModelSpec, padding_multiple: int, note: Callable[[str], None]) -> None:
        self._run, self._spec, self._padding, self._note = run, spec, padding_multiple, note
        self._job: JobConfig | None = None
        self._process: BaseProcess | None = None
        self._answer: Connection | None = None

    def check(self, job: JobConfig) -> bool:
        """Whether a job was found good; False where that is not known yet.

        Raises:
            UserError: it can't be trained.
        """
        new = NewJob(run=replace(self._run, jobs=(job,)), spec=self._spec, padding_multiple=self._padding)
        if new.data_bytes <= LARGE or current_process().daemon:
            new.check()
            return True
        if self._process is None:
            self._note(f"{job.name} wants to join: its data is being read")
            self._start(job, new)
        assert self._answer is not None
        if self._job != job and self._process.is_alive():  # another one's: in turn
            return False
        if not self._answer.poll():
            return False
        answer, asked = self._receive(), self._job
        if asked != job:  # withdrawn or changed since
            return self.check(job)
        if answer is not None:
            raise answer
        return True

    def close(self) -> None:
        """End a check that is under way."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None

    def _start(self, job: JobConfig, new: NewJob) -> None:
        context = get_context("spawn")  # a fork would copy a CUDA context
        self._answer, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_check, args=(theirs, new), name="new-job", daemon=True)
        self._process.start()
        self._job = job
        theirs.close()

    def _receive(self) -> UserError | None:
        """What the process found wrong, its own death included: here, all ranks would wait and the next one die."""
        assert self._answer is not None
        assert self._process is not None
        try:
            answer: UserError | None = self._answer.recv()
        except (OSError, EOFError):
            self._process.join()
            answer = UserError(
                f"the process that read its data ended with {self._process.exitcode} (-9: perhaps memory is short)",
                rule="a job's data is read once before it joins",
                remedy="add it again, or split its data",
                key="dataset.path",
            )
        self._answer.close()
        self._process.join()
        self._process = None
        return answer


def check_room(
    run: RunConfig,
    spec: ModelSpec,
    layers_per_chunk: Sequence[int],
    mounted: Sequence[JobConfig],
    new: JobConfig,
    room: int,
) -> None:
    """Refuse a job with which a stage would not fit into its GPU, and the run would end for all jobs.

    Args:
        run: the run.
        spec: its base model.
        layers_per_chunk: of the model.
        mounted: jobs whose adapters are on the model.
        new: the job.
        room: bytes of a GPU.

    Raises:
        UserError: the predicted peak is more than that.
    """
    predicted = predict_run_memory(replace(run, jobs=(*mounted, new)), spec, layers_per_chunk)
    stage = max(range(len(predicted)), key=lambda stage: predicted[stage].total)
    if predicted[stage].total > room:
        raise UserError(
            f"with it stage {stage} would take {predicted[stage].total / 2**30:.1f} GiB",
            rule=f"its GPU has {room / 2**30:.1f} GiB",
            remedy="add it when another job has ended, or with a smaller rank",
            key="peft.r",
        )


def _check(answer: Connection, new: NewJob) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    try:
        new.check()
    except UserError as error:
        answer.send(error)
    except Exception as error:  # whatever it is, the run must hear of it
        answer.send(
            UserError(
                f"{type(error).__name__}: {error}", rule="its data can be read", remedy="see the data", key="dataset"
            )
        )
    else:
        answer.send(None)
