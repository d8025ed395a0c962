"""The jobs of a run and how each gets its data and its place on the model."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..config.job import JobConfig
from ..config.run import RunConfig
from ..errors import UserError
from ..mcore.parallel import Groups
from ..models.adapter import load_initial_adapter
from ..types import AdapterSpec, Sample, Schedule
from .checks import check_dataset
from .inputs import PARTS, job_batches, load_rows
from .jobs import Job
from .rack import AdapterRack
from .resume import Resumed
from .setup import Prepared

Note = Callable[[str], None]


class Roster:
    """All jobs of a run; the same on every rank.

    Attributes:
        run: the run with every job so far; a job's index is its place among them.
        jobs: index -> job.
    """

    def __init__(self, prepared: Prepared, groups: Groups, rack: AdapterRack, resumed: Resumed, note: Note) -> None:
        self._prepared, self._groups, self._rack, self._note = prepared, groups, rack, note
        self._ours = {config.name for config in prepared.run.jobs}
        self.run: RunConfig = resumed.run
        self.jobs: dict[int, Job] = {}
        mounting = []
        for index, config in enumerate(self.run.jobs):
            job = self.jobs[index] = _job(index, config, resumed)
            kept = resumed.counters(index) is not None
            # A checkpoint holds the adapter of a job that ended where its last window goes on, or its last adapter
            # could not be written. Of others that ended only those in the run file may have become longer.
            if job.live or kept or (job.status == "finished" and config.name in self._ours):
                mounting.append(job)
        for job in mounting:  # the job's alone from here on, to be let go of when it leaves
            job.dataset = prepared.datasets.pop(job.name, None)
            job.eval_dataset = prepared.eval_datasets.pop(job.name, None)
        troubles = self._load(mounting)
        for job in mounting:
            self._mount(job, troubles.get(job.index), resumed)
        prepared.datasets.clear()
        prepared.eval_datasets.clear()
        if groups.is_first:
            prepared.rows.drop_old()

    @property
    def names(self) -> list[str]:
        """Name of each job, by index."""
        return [job.name for job in self.jobs.values()]

    def adapter_spec(self, index: int) -> AdapterSpec:
        """The adapter of a job."""
        return self.run.adapter_spec(index)

    def add(self, config: JobConfig) -> Job:
        """Take a job on that came while the run goes on."""
        index = len(self.jobs)
        self.run = replace(self.run, jobs=(*self.run.jobs, config))
        job = self.jobs[index] = Job(index=index, config=config, dataset=None, source=None, added=True)
        self._mount(job, self._load([job]).get(index), None)
        return job

    def resume(self, job: Job) -> None:
        """Let a paused job go on; one whose data was away stays paused while it is."""
        if job.source is None:
            trouble = self._load([job]).get(job.index)
            if trouble is not None:
                self._pause(job, trouble)
                return
            self._open(job)
        job.status, job.reason = "running", ""

    def still_plans(self, schedule: Schedule) -> bool:
        """Whether what is left of a window (`trim_schedule`) is still of the jobs' data, order, length and validations.

        Samples of steps that are done are in it too, since they run again beside the others.
        """
        planned: dict[tuple[int, int], set[Sample]] = {}
        for replica in schedule.replicas:
            for microbatch in replica:
                for sample in microbatch.samples:
                    planned.setdefault((sample.job, sample.step), set()).add(sample)

        def is_step(job: Job, step: int, samples: set[Sample]) -> bool:
            if job.source is None or step > job.num_steps:
                return False
            now = set(job.source.batch(step).samples)
            return samples <= now if step <= job.applied else samples == now

        for index, step in planned:  # the interval of its validations may have changed
            job = self.jobs[index]
            if step > job.applied + job.config.eval.steps_until_next(job.applied):
                return False
        return all(is_step(self.jobs[index], step, samples) for (index, step), samples in planned.items())

    def _mount(self, job: Job, trouble: str | None, resumed: Resumed | None) -> None:
        """Put a job's adapter on the model, unless it has nothing left to train.

        Args:
            job: the job.
            trouble: why its data can't be had.
            resumed: where its state may be.
        """
        counters = resumed.counters(job.index) if resumed else None
        if trouble is None:
            asked_before = job.num_steps
            self._open(job)
            if counters is None and job.status == "finished":
                _check_not_longer(job, asked_before)
                job.let_go()
                return
            if job.status == "finished" and job.applied < job.num_steps and not job.reason:
                job.status = "running"  # the run file gives it more steps than it had
        elif counters is None:
            self._stop(job, trouble)
            return
        elif job.live:  # what it has learnt must not be lost because a disk was away
            self._pause(job, trouble)
        spec, initial = self.adapter_spec(job.index), None
        if counters is None:
            initial, trouble = self._initial(job, spec)
            if trouble is not None:
                self._stop(job, trouble)
                return
        if not job.added or counters is not None:
            self._rack.mount(job, spec, state=resumed.path if resumed else None, counters=counters, initial=initial)
            return
        trouble = self._try_to_mount(job, spec, initial)
        if trouble is not None:
            self._stop(job, trouble)

    def _try_to_mount(self, job: Job, spec: AdapterSpec, initial: Mapping[str, torch.Tensor] | None) -> str | None:
        """Mount a job that came to a running run on all ranks, or on none and say why."""
        error = None
        try:
            self._rack.mount(job, spec, initial=initial)
        except torch.OutOfMemoryError as short:
            error = UserError(
                f"no room for its adapter ({str(short).splitlines()[0]})",
                rule="an adapter, its gradient and its moments take 16 to 18 bytes a parameter",
                remedy="add it again when another job has ended",
                key=f"jobs.{job.name}",
            )
        trouble = self._agree([job], [error])[0]
        if trouble is None:
            return None
        if job.slot is not None:
            self._rack.unmount(job)
        return str(trouble)

    def _load(self, jobs: Sequence[Job]) -> dict[int, str]:
        """Read the data of jobs that have none yet, and compare what the ranks have; every rank calls it.

        Returns:
            Job -> why its data can't be had, on this rank or another; the others go on.

        Raises:
            UserError: it is a job of the run file, whose data every rank has read and checked before.
        """
        errors: list[UserError | None] = []
        for job in jobs:
            errors.append(None)
            try:
                self._read(job)
            except UserError as error:
                errors[-1] = error
            except OSError as error:  # a file that went away between two looks at it
                errors[-1] = UserError(
                    f"its data can't be read ({error})",
                    rule="every rank reads it",
                    remedy="check the files",
                    key=f"jobs.{job.name}",
                )
        if (unkept := self._prepared.rows.take_trouble()) is not None:
            self._note(unkept)
        digests = [_digest(job) if self._groups.size > 1 else "" for job in jobs]
        troubles = {}
        for job, error in zip(jobs, self._agree(jobs, errors, digests), strict=True):
            if error is not None:
                if job.name in self._ours:
                    raise error
                job.let_go()
                troubles[job.index] = str(error)
        return troubles

    def _read(self, job: Job) -> None:
        """Read and check a job's data where it is not there yet."""
        run, spec, key = self.run, self._prepared.spec, f"jobs.{job.name}"
        for part in PARTS:
            if (job.dataset if part == "dataset" else job.eval_dataset) is not None:
                continue
            rows = load_rows(run, job.index, part, self._prepared.rows, vocab_size=spec.vocab_size, key=key)
            if rows is not None:
                multiple = self._prepared.padding_multiple
                check_dataset(run, spec, job.index, rows, padding_multiple=multiple, section=part, key=key)
            if part == "dataset":
                job.dataset = rows
            else:
                job.eval_dataset = rows

    def _initial(self, job: Job, spec: AdapterSpec) -> tuple[Mapping[str, torch.Tensor] | None, str | None]:
        """The adapter that a new job starts from, the same on every rank, or why it can't be had."""
        folder, key = job.config.peft.init_from, f"jobs.{job.name}.peft.init_from"
        if folder is None:
            return None, None
        tensors, error = None, None
        try:
            tensors = load_initial_adapter(folder, self._prepared.spec, spec, key=key)
        except UserError as found:
            error = found
        digest = _tensors_digest(tensors or {}) if self._groups.size > 1 else ""
        error = self._agree([job], [error], [digest])[0]
        if error is not None and job.name in self._ours:
            raise error
        return tensors, None if error is None else str(error)

    def _agree(
        self, jobs: Sequence[Job], errors: Sequence[UserError | None], digests: Sequence[str] = ()
    ) -> list[UserError | None]:
        """What is wrong with each of some jobs on the first rank that has trouble with it.

        Args:
            jobs: the jobs.
            errors: this rank's.
            digests: of what this rank has read for them; that it is not what rank 0 has is an error too.
        """
        everyone = self._groups.gather((list(errors), list(digests)))
        agreed: list[UserError | None] = []
        for place, job in enumerate(jobs) if everyone is not None else ():
            assert everyone is not None
            found = [(rank, theirs[place]) for rank, (theirs, _) in enumerate(everyone) if theirs[place] is not None]
            others = [rank for rank, (_, theirs) in enumerate(everyone) if digests and theirs[place] != digests[place]]
            if found:
                agreed.append(found[0][1])
            elif others:
                agreed.append(_difference(job.name, others[0]))
            else:
                agreed.append(None)
        out: list[UserError | None] = self._groups.broadcast(agreed)
        return out

    def _open(self, job: Job) -> None:
        assert job.dataset is not None
        job.source = job_batches(self.run, job.index, job.dataset)
        job.num_steps = job.source.num_steps

    def _pause(self, job: Job, trouble: str) -> None:
        job.status, job.reason = "paused", trouble
        self._note(f"{job.name} is paused at step {job.applied}, the others go on: {trouble}")

    def _stop(self, job: Job, trouble: str) -> None:
        job.status, job.reason = "stopped", trouble
        job.let_go()
        self._note(f"{job.name} is stopped at step {job.applied}, the others go on: {trouble}")


def _job(index: int, config: JobConfig, resumed: Resumed) -> Job:
    """A job as the checkpoint has it."""
    job, record = Job(index=index, config=config, dataset=None, source=None), resumed.record(index)
    if record is not None:
        job.status, job.reason, job.added = record["status"], record["reason"], record["added"]
        job.applied, job.losses = record["applied"], list(record["losses"])
        job.evals = [(step, loss) for step, loss in record["evals"]]
        job.num_steps = record["num_steps"]
    return job


def _difference(name: str, rank: int) -> UserError:
    return UserError(
        f"rank {rank} has read something else than rank 0",
        rule="all ranks train on the same rows and start from the same adapter",
        remedy="give every host the same files, which nobody may write meanwhile",
        key=f"jobs.{name}",
    )


def _digest(job: Job) -> str:
    return ".".join(rows.digest for rows in (job.dataset, job.eval_dataset) if rows is not None)


def _tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_not_longer(job: Job, asked_before: int) -> None:
    """A job that ended has left the model, early too; its moments are not kept."""
    if job.num_steps > (asked_before if job.reason else job.applied):
        raise UserError(
            f"{job.num_steps} steps for {job.name}, which ended after {job.applied}",
            rule="the optimizer's state of a job that ended is not kept",
            remedy="give the longer training a new name and peft.init_from: the adapter's folder",
            key=f"jobs.{job.name}.train",
        )
