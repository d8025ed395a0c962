"""The dropout masks: same bits everywhere, the right rate, independent of all that they should be independent of."""

import pytest
import torch
from kernel_cases import masks_drawn, random_keys

from lorafusion_megatron.kernels import dropout
from lorafusion_megatron.lora.reference import TorchBackend
from lorafusion_megatron.lora.triton_backend import TritonBackend

ROWS, FEATURES = 2048, 1024


def keys(seed: int = 7, step: int = 1, sample: int = 3, rows: int = ROWS) -> torch.Tensor:
    """Keys of consecutive tokens of one sample."""
    position = torch.arange(rows)
    constant = torch.ones_like(position)
    return dropout.row_keys(constant * seed, constant * step, constant * sample, position)


def mask(of: torch.Tensor | None = None, module_key: int = 11, p: float = 0.5) -> torch.Tensor:
    return dropout.keep_mask(keys() if of is None else of, module_key, FEATURES, p)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard deviations of what independent masks give."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return ((a * b).mean() / (a.std() * b.std()) * a.numel() ** 0.5).item()


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_rate(p):
    kept = mask(p=p).double().mean().item()
    deviation = (p * (1 - p) / (ROWS * FEATURES)) ** 0.5
    assert abs((1 - kept) - p) < 4 * deviation + 0.5 / dropout.LEVELS
    assert dropout.keep_scale(p) == pytest.approx(1 / (1 - p), rel=5e-4)
    # The scale is the inverse of the rate that the threshold gives, not of the rate that was asked for.
    assert dropout.keep_scale(p) * (1 - dropout.threshold(p) / dropout.LEVELS) == pytest.approx(1.0, rel=1e-12)


def test_no_dropout_keeps_all():
    assert mask(p=0.0).all()
    assert dropout.keep_scale(0.0) == 1.0


def test_rows_and_columns_have_the_rate_each():
    kept = mask(p=0.1).double()
    for dim, count in ((0, ROWS), (1, FEATURES)):
        deviations = (kept.mean(dim) - 0.9) / (0.09 / count) ** 0.5
        assert deviations.abs().max() < 5
        assert 0.9 < deviations.std() < 1.1


OTHERS = {
    "seed": {"of": keys(seed=8)},
    "seed by its high half": {"of": keys(seed=7 + (1 << 32))},
    "step": {"of": keys(step=2)},
    "sample": {"of": keys(sample=4)},
    "module": {"module_key": 12},
    "module by a golden step": {"module_key": (11 + 0x9E3779B9) % (1 << 32)},
    "module by the high bit": {"module_key": 11 + (1 << 31)},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_independent_of_the_same_mask_elsewhere(other):
    assert abs(correlation(mask(), mask(**other))) < 4.5


@pytest.mark.parametrize("shift", [1, 2, 3, 16, 64, 97])
def test_neighbours_are_independent(shift):
    kept = mask()
    assert abs(correlation(kept[shift:], kept[:-shift])) < 4.5
    assert abs(correlation(kept[:, shift:], kept[:, :-shift])) < 4.5
    assert abs(correlation(kept[shift:, shift:], kept[:-shift, :-shift])) < 4.5
    # A module key that lies golden steps apart shifts the counter by words: its masks must not be shifted copies.
    moved = mask(module_key=(11 + shift * 0x9E3779B9) % (1 << 32))
    assert abs(correlation(kept[:, 2 * shift :], moved[:, : -2 * shift])) < 4.5


def test_rows_are_all_different():
    packed = mask(p=0.5)[:, :62].long() @ (1 << torch.arange(62))
    assert packed.unique().numel() == ROWS


def test_order_of_packing_does_not_matter():
    order = torch.randperm(ROWS)
    assert torch.equal(mask()[order], mask(of=keys()[order]))


@pytest.mark.parametrize("parts", [2, 4])
def test_shards_of_the_features_are_parts_of_the_whole(parts):
    whole, size = mask(p=0.3), FEATURES // parts
    for part in range(parts):
        shard = dropout.keep_mask(keys(), 11, size, 0.3, feature_offset=part * size)
        assert torch.equal(shard, whole[:, part * size : (part + 1) * size])


BACKENDS = {
    "torch": TorchBackend,
    "fused": lambda: TritonBackend("cpu", strategy="fused", interpret=True),
    "expand": lambda: TritonBackend("cpu", strategy="expand", interpret=True),
}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize(("p", "offset"), [(0.1, 0), (0.5, 384)])
def test_every_pass_of_every_backend_draws_the_same_bits(backend, p, offset):
    of = random_keys(64, 5)
    module_key = 0xDEADBEEF
    want = dropout.keep_mask(of, module_key, 128, p, feature_offset=offset)
    drawn = masks_drawn(backend(), of, module_key=module_key, p=p, feature_offset=offset, dtype=torch.float32)
    for got in drawn:
        assert torch.equal(got, want)
