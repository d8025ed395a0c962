"""Which rows make up each global batch of a job: a pure function of the step, so that a resume is exact."""

import numpy as np
import numpy.typing as npt

from lorafusion_megatron.data.dataset import JobDataset
from lorafusion_megatron.types import GlobalBatch, Sample


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64, elementwise and bijective."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_order(rows: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of the rows in one epoch: sorted by ``mix(row * GOLDEN + mix(epoch * GOLDEN + mix(seed)))``.

    Args:
        rows: number of rows.
        seed: the job's seed.
        epoch: counted from 0.

    Returns:
        int64 ``[rows]``, a permutation.

    Note: made from integer arithmetic and a sort because NumPy keeps the streams of its generators only within a
        version, and a resumed run must see the same order. 0.2 s for a million rows.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        salt = _mix(np.array([seed], dtype=np.uint64))
        salt = _mix(np.array([epoch], dtype=np.uint64) * golden + salt)
        keys = _mix(np.arange(rows, dtype=np.uint64) * golden + salt)
    return np.argsort(keys, kind="stable")


class GlobalBatches:
    """The global batches of one job, by step.

    Step s (from 1) takes the rows at the cursor positions ``(s - 1) * global_batch_size + j``, position c being row
    ``c mod rows`` of the file, or of the order of epoch ``c div rows`` with ``shuffle``.

    Args:
        dataset: the job's rows.
        job: its index in the run.
        seed: its seed; matters with ``shuffle`` only.
        shuffle: whether each epoch has an order of its own.
        global_batch_size: rows per step.
        train_iters: optimizer steps of the job.
    """

    def __init__(
        self, dataset: JobDataset, *, job: int, seed: int, shuffle: bool, global_batch_size: int, train_iters: int
    ) -> None:
        self.dataset, self.job, self.seed, self.shuffle = dataset, job, seed, shuffle
        self.global_batch_size = global_batch_size
        self.num_steps = train_iters
        """Optimizer steps of the job."""
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """int64 ``[global_batch_size]``: rows of the data set in the order of the batch.

        Raises:
            ValueError: the job has no such step.
        """
        if not 1 <= step <= self.num_steps:
            raise ValueError(f"step {step} of a job with steps 1 to {self.num_steps}")
        cursor = (step - 1) * self.global_batch_size + np.arange(self.global_batch_size, dtype=np.int64)
        epochs, places = np.divmod(cursor, len(self.dataset))
        if not self.shuffle:
            return places
        out = np.empty_like(places)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            out[here] = self._order(epoch)[places[here]]
        return out

    def counts(self, step: int) -> dict[str, int]:
        """``samples``, ``tokens`` and ``label_tokens`` of `batch`, without making its samples.

        Raises:
            ValueError: the job has no such step.
        """
        rows = self.rows(step)
        labels = self.dataset.label_tokens[rows]
        used = labels > 0
        return {
            "samples": int(used.sum()),
            "tokens": int(self.dataset.lengths[rows][used].sum()),
            "label_tokens": int(labels.sum()),
        }

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of ``step``, without its rows that have no label token.

        Raises:
            ValueError: the job has no such step.
        """
        rows = self.rows(step)
        labels = self.dataset.label_tokens[rows]
        total = int(labels.sum())
        tokens = self.dataset.lengths[rows]
        samples = tuple(
            Sample(
                job=self.job,
                step=step,
                position=int(position),
                row=int(rows[position]),
                tokens=int(tokens[position]),
                batch_label_tokens=total,
            )
            for position in np.flatnonzero(labels)
        )
        return GlobalBatch(job=self.job, step=step, samples=samples, label_tokens=total)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Order of an epoch; the last two asked for are kept, since batches cross from one to the next."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = epoch_order(len(self.dataset), seed=self.seed, epoch=epoch)
        return self._orders[epoch]
