"""Validation of the jobs that are due: forward only, all due jobs packed together, weighted by label tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..data.dataset import JobDataset
from ..mcore.parallel import Groups
from ..mcore.stop import anyone
from ..mcore.stream import DeviceBatch, StreamRunner
from ..scheduler.build import PlanOptions, build_schedule
from ..types import GlobalBatch, Microbatch, Sample, Schedule
from .batches import BatchMaker
from .prefetch import prefetch

PIECE = 16
"""Microbatches of a stage between two questions whether to stop: some seconds, and a few per cent spent on filling."""


class Validator:
    """Validates jobs on all ranks, a piece at a time, so that a stop need not wait for all of it.

    Args:
        runner: of this rank's model.
        batches: makes its microbatches.
        groups: this rank's groups.
        options: what windows are planned for.
    """

    def __init__(self, runner: StreamRunner, batches: BatchMaker, groups: Groups, options: PlanOptions) -> None:
        self._runner, self._batches, self._groups, self._options = runner, batches, groups, options

    def losses(self, datasets: Mapping[int, JobDataset], wished: Callable[[], bool]) -> dict[int, float] | None:
        """The loss per label token of jobs on their validation rows, the same on every rank.

        Args:
            datasets: job -> its validation rows.
            wished: whether this rank wishes to stop.

        Returns:
            Job -> loss; None where a rank wished to stop: then nothing was validated.
        """
        groups = self._groups
        schedule = groups.broadcast(plan_evaluation(datasets, self._options) if groups.is_first else None)
        mine, sums = schedule.replicas[groups.dp_rank], {}
        piece = PIECE * groups.pp_size  # whole groups of an interleaved schedule
        for start in range(0, schedule.num_microbatches, piece):
            if anyone(groups, wished=wished()):
                return None
            part = mine[start : start + piece]
            self._runner.evaluate(
                partial(self._prefetched, part, datasets), self._batches.rows(part), schedule.token_capacity, sums
            )
        return mean_losses(sums, sorted(datasets), groups)

    def _prefetched(self, part: Sequence[Microbatch], datasets: Mapping[int, JobDataset]) -> Iterator[DeviceBatch]:
        return prefetch(self._batches.validation(part, datasets), self._groups.device)


def plan_evaluation(datasets: Mapping[int, JobDataset], options: PlanOptions) -> Schedule:
    """Every validation row of every job once, in as few microbatches as may be.

    Args:
        datasets: job -> its validation rows.
        options: as for training.
    """
    return build_schedule([[_whole(job, dataset)] for job, dataset in datasets.items()], options)


def mean_losses(sums: Mapping[int, torch.Tensor], jobs: Sequence[int], groups: Groups) -> dict[int, float]:
    """Sum over replicas and stages of what `StreamRunner.evaluate` left on each rank: the loss per label token.

    Every rank of the run calls it and gets the same.
    """
    total = torch.zeros(len(jobs), dtype=torch.float64)
    if groups.tp_rank == 0:
        for place, job in enumerate(jobs):
            if job in sums:
                total[place] = float(sums[job])
    dist.all_reduce(total, group=groups.objects)
    return dict(zip(jobs, total.tolist(), strict=True))


def _whole(job: int, dataset: JobDataset) -> GlobalBatch:
    """All rows with a label token as one global batch."""
    labels: Any = dataset.label_tokens
    total = int(labels.sum())
    samples = tuple(
        Sample(
            job=job,
            step=1,
            position=int(row),
            row=int(row),
            tokens=int(dataset.lengths[row]),
            batch_label_tokens=total,
        )
        for row in np.flatnonzero(labels)
    )
    return GlobalBatch(job=job, step=1, samples=samples, label_tokens=total)
