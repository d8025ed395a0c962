"""Which rows a global batch holds."""

from pathlib import Path

import numpy as np
import pytest

from lorafusion_megatron.data import GlobalBatches, JobDataset
from lorafusion_megatron.data.dataset import DatasetBuilder
from lorafusion_megatron.data.order import epoch_order
from lorafusion_megatron.types import Sample


def dataset(*label_tokens: int) -> JobDataset:
    """Rows of 3 prompt tokens and the given numbers of label tokens."""
    builder = DatasetBuilder()
    for count in label_tokens:
        builder.append([7] * (3 + count), [False] * 3 + [True] * count)
    return builder.build(Path("x.jsonl"))


def batches(data: JobDataset, *, size: int, steps: int, shuffle: bool = False, seed: int = 5) -> GlobalBatches:
    return GlobalBatches(data, job=2, seed=seed, shuffle=shuffle, global_batch_size=size, train_iters=steps)


def test_file_order_wraps_round_as_the_oracle_does() -> None:
    rows, size, steps = 17, 5, 12
    ours = batches(dataset(*range(1, rows + 1)), size=size, steps=steps)
    cursor = 0
    for step in range(1, steps + 1):
        expected = [(cursor + j) % rows for j in range(size)]
        cursor += size
        batch = ours.batch(step)
        assert [sample.row for sample in batch.samples] == expected
        assert batch.label_tokens == sum(row + 1 for row in expected)


def test_a_batch_in_full() -> None:
    batch = batches(dataset(4, 0, 6), size=4, steps=2).batch(2)
    # Positions 4 to 7 of 0 1 2 0 1 2 0 1: rows 1 2 0 1, of which row 1 has no label token.
    assert batch.samples == (
        Sample(job=2, step=2, position=1, row=2, tokens=9, batch_label_tokens=10),
        Sample(job=2, step=2, position=2, row=0, tokens=7, batch_label_tokens=10),
    )
    assert (batch.job, batch.step, batch.label_tokens) == (2, 2, 10)


def test_a_batch_without_label_tokens_is_empty() -> None:
    batch = batches(dataset(0, 0, 3), size=2, steps=3).batch(1)
    assert (batch.samples, batch.label_tokens) == ((), 0)


def test_a_batch_larger_than_the_data_set() -> None:
    ours = batches(dataset(1, 1, 1), size=7, steps=2)
    assert ours.rows(1).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert ours.rows(2).tolist() == [1, 2, 0, 1, 2, 0, 1]
    shuffled = batches(dataset(1, 1, 1), size=7, steps=2, shuffle=True)
    both = np.concatenate([shuffled.rows(1), shuffled.rows(2)])
    for epoch in range(4):
        assert sorted(both[3 * epoch : 3 * epoch + 3]) == [0, 1, 2]


def test_shuffled_epochs_are_permutations_of_their_own() -> None:
    ours = batches(dataset(*[1] * 20), size=4, steps=15, shuffle=True)
    order = np.concatenate([ours.rows(step) for step in range(1, 16)]).reshape(3, 20)
    assert all(sorted(epoch) == list(range(20)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3
    other = batches(dataset(*[1] * 20), size=4, steps=15, shuffle=True, seed=6)
    assert other.rows(1).tolist() != ours.rows(1).tolist()


def test_any_step_can_be_asked_for_at_any_time() -> None:
    data = dataset(*range(1, 12))
    forwards = batches(data, size=3, steps=30, shuffle=True)
    expected = {step: forwards.batch(step) for step in range(1, 31)}
    backwards = batches(data, size=3, steps=30, shuffle=True)
    assert all(backwards.batch(step) == expected[step] for step in range(30, 0, -1))


def test_the_order_never_changes_between_versions() -> None:
    # Computed with Python integers from the formula in `epoch_order`.
    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for seed, epoch in ((0, 0), (1234, 0), (2**63 - 1, 5)):
        golden = 0x9E3779B97F4A7C15
        salt = mix((epoch * golden + mix(seed)) % 2**64)
        keys = [mix((row * golden + salt) % 2**64) for row in range(50)]
        assert epoch_order(50, seed=seed, epoch=epoch).tolist() == sorted(range(50), key=keys.__getitem__)
    assert epoch_order(8, seed=1234, epoch=0).tolist() == [3, 7, 5, 0, 2, 6, 1, 4]


def test_every_row_is_equally_likely_at_every_place() -> None:
    first = [epoch_order(10, seed=seed, epoch=0)[0] for seed in range(4000)]
    counts = np.bincount(first, minlength=10)
    # 400 expected each, standard deviation 19: six of them.
    assert counts.min() > 400 - 115
    assert counts.max() < 400 + 115


@pytest.mark.parametrize("step", [0, 4, -1])
def test_steps_that_do_not_exist(step: int) -> None:
    with pytest.raises(ValueError, match="steps 1 to 3"):
        batches(dataset(1, 1), size=1, steps=3).batch(step)


def test_the_counts_are_those_of_the_batch() -> None:
    ours = batches(dataset(4, 0, 6, 1, 0), size=3, steps=9, shuffle=True)
    for step in range(1, 10):
        batch = ours.batch(step)
        assert ours.counts(step) == {
            "samples": len(batch.samples),
            "tokens": sum(sample.tokens for sample in batch.samples),
            "label_tokens": batch.label_tokens,
        }
    with pytest.raises(ValueError, match="step 10"):
        ours.counts(10)
