"""From planned microbatches to what the pipeline reads: this rank's rows, labels, seeds and slots, on the host."""

from collections.abc import Iterator, Mapping, Sequence

from ..data.collate import collate
from ..data.dataset import JobDataset
from ..mcore.batch import HostBatch, host_batch
from ..mcore.parallel import Groups
from ..mcore.stream import DeviceBatch
from ..types import Microbatch, Schedule
from .roster import Roster
from .setup import Prepared


class BatchMaker:
    """Makes this replica's microbatches out of the jobs' rows."""

    def __init__(self, prepared: Prepared, groups: Groups, roster: Roster) -> None:
        self._prepared, self._groups, self._roster = prepared, groups, roster

    def training(self, schedule: Schedule, applied: Mapping[int, int]) -> Iterator[HostBatch]:
        """A window's microbatches, in order.

        Args:
            schedule: the window.
            applied: steps that each job had done when it began; samples of these have weight 0.
        """
        datasets = {index: job.dataset for index, job in self._roster.jobs.items() if job.dataset is not None}
        for microbatch in schedule.replicas[self._groups.dp_rank]:
            done = {sample.job: applied[sample.job] for sample in microbatch.samples}
            yield self._make(microbatch, datasets, done)

    def validation(self, microbatches: Sequence[Microbatch], datasets: Mapping[int, JobDataset]) -> Iterator[HostBatch]:
        """Microbatches that run without dropout, in order."""
        for microbatch in microbatches:
            yield self._make(microbatch, datasets, {}, validation=True)

    def rows(self, microbatches: Sequence[Microbatch]) -> list[int]:
        """Padded rows of each microbatch."""
        prepared = self._prepared
        return [m.rows(prepared.padding_multiple, prepared.row_multiple) for m in microbatches]

    def noop(self) -> DeviceBatch:
        """An empty microbatch."""
        return self._make(Microbatch(), {}, {}).to(self._groups.device)[0]

    def _make(
        self,
        microbatch: Microbatch,
        datasets: Mapping[int, JobDataset],
        done: Mapping[int, int],
        *,
        validation: bool = False,
    ) -> HostBatch:
        prepared, roster = self._prepared, self._roster
        packed = collate(microbatch, datasets, prepared.padding_multiple, row_multiple=prepared.row_multiple)
        for job, steps in done.items():
            packed.loss_weights[(packed.row_job == job) & (packed.row_step <= steps)] = 0.0
        jobs = {sample.job for sample in microbatch.samples}
        return host_batch(
            packed,
            seeds={job: roster.run.job_seed(job) for job in jobs},
            slots={job: self._slot(job) + validation for job in jobs},
            tile=prepared.backend.tile,
            pinned=self._groups.device.type == "cuda",
        )

    def _slot(self, job: int) -> int:
        slot = self._roster.jobs[job].slot
        assert slot is not None
        return slot
