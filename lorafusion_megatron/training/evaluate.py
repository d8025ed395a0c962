"""Validation of the jobs that are due: forward only, all due jobs packed together, weighted by label tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..data.dataset import JobDataset
from ..mcore.parallel import Groups
from ..scheduler.build import PlanOptions, build_schedule
from ..types import GlobalBatch, Sample, Schedule


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
