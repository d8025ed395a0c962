"""A microbatch as flat arrays: packed tokens, labels, weights, positions, sequence borders, dropout keys."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorafusion_megatron.data.dataset import JobDataset
from lorafusion_megatron.types import Microbatch, Segment

NO_JOB = -1
"""``row_job`` of rows that belong to no job."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """The T rows of one microbatch; a row is a token or padding."""

    input_ids: npt.NDArray[np.int64]
    """``[T]``; 0 in padding."""
    labels: npt.NDArray[np.int64]
    """``[T]``: the next token of the same sample; 0 where there is none."""
    loss_weights: npt.NDArray[np.float32]
    """``[T]``: ``1 / batch_label_tokens`` where the next token is a label, else 0. The weighted sum over all rows of
    a global batch is the step's loss."""
    position_ids: npt.NDArray[np.int64]
    """``[T]``: restarts at 0 with each sample, goes on through the padding after it."""
    cu_seqlens: npt.NDArray[np.int32]
    """``[sequences + 1]``: starts at 0, ends at T. Padding lengthens the sequence before it; attention is causal, so
    no token sees it."""
    max_seqlen: int
    """Longest sequence, padding included."""
    segments: tuple[Segment, ...]
    """Rows of each job. Rows past the last one (from ``row_multiple``) and no-op microbatches belong to no job."""
    row_job: npt.NDArray[np.int64]
    """``[T]``: the job; `NO_JOB` outside of segments."""
    row_step: npt.NDArray[np.int64]
    """``[T]``: the job's optimizer step; 0 outside of segments."""
    row_sample: npt.NDArray[np.int64]
    """``[T]``: the sample's position in its global batch; 0 outside of segments."""
    row_position: npt.NDArray[np.int64]
    """``[T]``: the token's position in its sample (``position_ids``, named for the dropout key)."""

    @property
    def num_tokens(self) -> int:
        """T: rows, padding included."""
        return len(self.input_ids)


def collate(
    microbatch: Microbatch,
    datasets: Mapping[int, JobDataset],
    padding_multiple: int,
    *,
    row_multiple: int = 1,
) -> PackedBatch:
    """Pack the samples of a microbatch one after the other.

    Args:
        microbatch: what to pack; empty for a no-op microbatch, whose weights are 0.
        datasets: job index -> its rows.
        padding_multiple: each job's rows are padded up to a multiple of this (the LoRA kernel's tile).
        row_multiple: T is rounded up to a multiple of this (sequence parallelism needs the tensor-parallel size).

    Raises:
        ValueError: a sample is not the row that the data set holds.
    """
    segments = microbatch.segments(padding_multiple)
    used = segments[-1].stop if segments else padding_multiple
    total = microbatch.rows(padding_multiple, row_multiple)
    input_ids, labels = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    weights = np.zeros(total, dtype=np.float32)
    begin = {segment.job: segment.start for segment in segments}
    starts: list[int] = []
    for sample in microbatch.samples:
        dataset = datasets[sample.job]
        ids = dataset.ids(sample.row)
        if len(ids) != sample.tokens:
            raise ValueError(f"{sample} has {len(ids)} tokens in {dataset.path}")
        start = begin[sample.job]
        stop = begin[sample.job] = start + sample.tokens
        input_ids[start:stop] = ids
        labels[start : stop - 1] = ids[1:]
        weights[start : stop - 1] = dataset.label_mask(sample.row)[1:] / np.float32(sample.batch_label_tokens)
        starts.append(start)
    cu_seqlens = np.array([*(starts or [0]), total], dtype=np.int32)
    lengths = np.diff(cu_seqlens)
    positions = np.arange(total, dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)
    keys = [(s.job, s.step, s.position) for s in microbatch.samples] or [(NO_JOB, 0, 0)]
    per_row = np.repeat(np.array(keys, dtype=np.int64), lengths, axis=0)
    per_row[used:] = (NO_JOB, 0, 0)
    return PackedBatch(
        input_ids=input_ids,
        labels=labels,
        loss_weights=weights,
        position_ids=positions,
        cu_seqlens=cu_seqlens,
        max_seqlen=int(lengths.max()),
        segments=segments,
        row_job=np.ascontiguousarray(per_row[:, 0]),
        row_step=np.ascontiguousarray(per_row[:, 1]),
        row_sample=np.ascontiguousarray(per_row[:, 2]),
        row_position=positions,
    )
