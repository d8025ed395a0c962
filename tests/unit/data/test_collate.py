"""Packed microbatches, value by value."""

from pathlib import Path

import numpy as np
import pytest

from lorafusion_megatron.data import NO_JOB, GlobalBatches, JobDataset, collate
from lorafusion_megatron.data.dataset import DatasetBuilder
from lorafusion_megatron.types import Microbatch, Sample, Segment


def dataset(*rows: tuple[list[int], list[int]]) -> JobDataset:
    """Rows of (prompt, completion) ids."""
    builder = DatasetBuilder()
    for prompt, completion in rows:
        builder.append(prompt + completion, [False] * len(prompt) + [True] * len(completion))
    return builder.build(Path("x.jsonl"))


DATA = {
    0: dataset(([10, 11], [12, 13]), ([20], [21])),
    3: dataset(([30], [31, 32, 33, 34]), ([], [40, 41])),
}


def sample(job: int, row: int, *, step: int = 1, position: int = 0, labels: int = 4) -> Sample:
    tokens = int(DATA[job].lengths[row])
    return Sample(job=job, step=step, position=position, row=row, tokens=tokens, batch_label_tokens=labels)


MIXED = Microbatch(
    samples=(
        sample(0, 0, step=2, position=1, labels=4),
        sample(0, 1, step=2, position=5, labels=4),
        sample(3, 1, step=9, position=0, labels=5),
        sample(3, 0, step=9, position=2, labels=5),
    )
)


def test_every_array_of_a_mixed_microbatch() -> None:
    packed = collate(MIXED, DATA, 4)
    # Job 0: 4 + 2 tokens and 2 rows of padding; job 3: 2 + 5 tokens and 1 row of padding.
    assert packed.input_ids.tolist() == [10, 11, 12, 13, 20, 21, 0, 0, 40, 41, 30, 31, 32, 33, 34, 0]
    assert packed.labels.tolist() == [11, 12, 13, 0, 21, 0, 0, 0, 41, 0, 31, 32, 33, 34, 0, 0]
    quarter, fifth = np.float32(1) / np.float32(4), np.float32(1) / np.float32(5)
    expected = [0, quarter, quarter, 0, quarter, 0, 0, 0, fifth, 0, fifth, fifth, fifth, fifth, 0, 0]
    assert packed.loss_weights.tolist() == [float(weight) for weight in expected]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]
    assert packed.cu_seqlens.tolist() == [0, 4, 8, 10, 16]
    assert packed.max_seqlen == 6
    assert packed.segments == (Segment(job=0, start=0, stop=8), Segment(job=3, start=8, stop=16))
    assert packed.row_job.tolist() == [0] * 8 + [3] * 8
    assert packed.row_step.tolist() == [2] * 8 + [9] * 8
    assert packed.row_sample.tolist() == [1] * 4 + [5] * 4 + [0] * 2 + [2] * 6
    assert packed.row_position.tolist() == packed.position_ids.tolist()
    assert packed.num_tokens == 16
    kinds = {name: getattr(packed, name).dtype for name in ("input_ids", "labels", "position_ids", "row_job")}
    assert set(kinds.values()) == {np.dtype(np.int64)}
    assert (packed.loss_weights.dtype, packed.cu_seqlens.dtype) == (np.float32, np.int32)


def test_rows_past_the_segments_belong_to_no_job() -> None:
    packed = collate(MIXED, DATA, 4, row_multiple=9)
    assert packed.num_tokens == 18
    assert packed.cu_seqlens.tolist() == [0, 4, 8, 10, 18]
    assert packed.max_seqlen == 8
    assert packed.row_job.tolist() == [0] * 8 + [3] * 8 + [NO_JOB] * 2
    assert packed.row_step[16:].tolist() == packed.row_sample[16:].tolist() == [0, 0]
    assert packed.segments[-1].stop == 16
    assert packed.loss_weights[16:].tolist() == [0, 0]


@pytest.mark.parametrize(("padding", "multiple", "rows"), [(1, 1, 1), (16, 1, 16), (3, 2, 4)])
def test_noop_microbatch(padding: int, multiple: int, rows: int) -> None:
    packed = collate(Microbatch(), DATA, padding, row_multiple=multiple)
    assert packed.input_ids.tolist() == packed.labels.tolist() == [0] * rows
    assert packed.loss_weights.sum() == 0
    assert packed.cu_seqlens.tolist() == [0, rows]
    assert packed.position_ids.tolist() == list(range(rows))
    assert packed.segments == ()
    assert set(packed.row_job.tolist()) == {NO_JOB}


def test_weights_of_a_global_batch_sum_to_one_however_it_is_split() -> None:
    """10 and 90 label tokens in two microbatches: the loss is the sum over 100, not a mean of means."""
    data = dataset(([1] * 5, [2] * 10), ([3] * 7, [4] * 90))
    batch = GlobalBatches(data, job=0, seed=0, shuffle=False, global_batch_size=2, train_iters=1).batch(1)
    packed = [collate(Microbatch(samples=(one,)), {0: data}, 8) for one in batch.samples]
    assert [float(part.loss_weights.sum()) for part in packed] == pytest.approx([0.1, 0.9])
    assert [int((part.loss_weights > 0).sum()) for part in packed] == [10, 90]


def test_a_sample_that_is_not_the_row_is_refused() -> None:
    wrong = Sample(job=0, step=1, position=0, row=1, tokens=3, batch_label_tokens=1)
    with pytest.raises(ValueError, match="has 2 tokens"):
        collate(Microbatch(samples=(wrong,)), DATA, 1)
