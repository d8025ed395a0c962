"""The jobs of a run and how each gets its data and its place on the model."""

from collections.abc import Callable
from dataclasses import replace

from ..config.job import JobConfig
from ..config.run import RunConfig
from ..errors import UserError
from ..mcore.parallel import Groups
from ..models.adapter import load_initial_adapter
from ..types import AdapterSpec, Sample, Schedule
from .inputs import job_batches, load_rows
from .jobs import Job
from .rack import AdapterRack
from .resume import Resumed
from .setup import Prepared


class Roster:
    """All jobs of a run; the same on every rank.

    Attributes:
        run: the run with every job so far; a job's index is its place among them.
        jobs: index -> job.
    """

    def __init__(
        self, prepared: Prepared, groups: Groups, rack: AdapterRack, resumed: Resumed, note: Callable[[str], None]
    ) -> None:
        self._prepared, self._groups, self._rack, self._note = prepared, groups, rack, note
        self.run: RunConfig = resumed.run
        self.jobs: dict[int, Job] = {}
        for index, config in enumerate(self.run.jobs):
            record = resumed.record(index)
            job = Job(
                index=index,
                config=config,
                dataset=prepared.datasets.get(config.name),
                eval_dataset=prepared.eval_datasets.get(config.name),
                source=None,
            )
            self.jobs[index] = job
            if record is not None:
                job.status, job.reason, job.added = record["status"], record["reason"], record["added"]
                job.applied, job.losses = record["applied"], list(record["losses"])
                job.evals = [(step, loss) for step, loss in record["evals"]]
                job.num_steps = record["num_steps"]
            kept = resumed.counters(index) is not None
            # A checkpoint holds the adapter of a job that ended where its last window goes on, or its last adapter
            # could not be written. Of others that ended only those in the run file may have become longer.
            if job.live or kept or (job.status == "finished" and config.name in {j.name for j in prepared.run.jobs}):
                self._mount(job, resumed)
        used = groups.gather(prepared.rows.used)
        if used is not None:  # every rank has its rows, and nobody looks for others yet
            prepared.rows.drop(set().union(*used))

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
        self._mount(job, None)
        return job

    def still_plans(self, schedule: Schedule) -> bool:
        """Whether the steps that a window has left are still those of the jobs' data, order and length."""
        planned: dict[tuple[int, int], set[Sample]] = {}
        for replica in schedule.replicas:
            for microbatch in replica:
                for sample in microbatch.samples:
                    if sample.step > self.jobs[sample.job].applied:
                        planned.setdefault((sample.job, sample.step), set()).add(sample)

        def is_step(job: Job, step: int, samples: set[Sample]) -> bool:
            return job.source is not None and step <= job.num_steps and samples == set(job.source.batch(step).samples)

        return all(is_step(self.jobs[index], step, samples) for (index, step), samples in planned.items())

    def _mount(self, job: Job, resumed: Resumed | None) -> None:
        """Load a job's data and put its adapter on the model, unless it has nothing left to train."""
        if not self._load(job):
            return
        assert job.dataset is not None
        job.source = job_batches(self.run, job.index, job.dataset)
        job.num_steps = job.source.num_steps
        counters = resumed.counters(job.index) if resumed else None
        if counters is None and job.status == "finished":
            _check_not_longer(job)
            job.dataset = job.source = job.eval_dataset = None
            return
        if job.status == "finished" and job.applied < job.num_steps and not job.reason:
            job.status = "running"  # the run file gives it more steps than it had
        self._rack.mount(job, self.adapter_spec(job.index), resumed.path if resumed else None, counters)

    def _load(self, job: Job) -> bool:
        """Read the data of a job that has none yet; every rank calls it.

        Returns:
            False where that of a job that joined can't be read any more, on this rank or another: the job is stopped,
            and the others go on. (Data of the run file's jobs was read and checked before the run began.)
        """
        trouble, guest = None, job.name not in {config.name for config in self._prepared.run.jobs}
        try:
            rows, vocab_size = self._prepared.rows, self._prepared.spec.vocab_size
            if job.dataset is None:
                job.dataset = load_rows(self.run, job.index, "dataset", rows, vocab_size=vocab_size)
            if job.eval_dataset is None:
                job.eval_dataset = load_rows(self.run, job.index, "eval", rows, vocab_size=vocab_size)
            if guest and job.config.peft.init_from is not None and job.applied == 0:
                load_initial_adapter(
                    job.config.peft.init_from,
                    self._prepared.spec,
                    self.adapter_spec(job.index),
                    key=f"jobs[{job.index}].peft.init_from",
                )
        except UserError as error:
            if not guest:
                raise
            trouble = str(error)
        if not guest:
            return True
        troubles = self._groups.broadcast(self._groups.gather(trouble))
        reasons = [f"rank {rank}: {text}" for rank, text in enumerate(troubles) if text]
        if not reasons:
            return True
        job.status, job.reason = "stopped", reasons[0]
        job.dataset = job.source = job.eval_dataset = None
        self._note(f"{job.name} is stopped at step {job.applied}, the others go on: {job.reason}")
        return False


def _check_not_longer(job: Job) -> None:
    """A job that ended has left the model; its moments are not kept."""
    if job.num_steps > job.applied and not job.reason:
        raise UserError(
            f"{job.num_steps} steps for {job.name}, which ended after {job.applied}",
            rule="the optimizer's state of a job that ended is not kept",
            remedy="give the longer training a new name and peft.init_from: the adapter's folder",
            key=f"jobs[{job.index}].train",
        )
