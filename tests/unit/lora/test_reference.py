"""The PyTorch backend against autograd over PEFT's formula, and the autograd function around it."""

import pytest
import torch

from lorafusion_megatron.kernels.dropout import keep_mask, keep_scale
from lorafusion_megatron.lora.adapters import ALL_ROWS, LinearAdapter, LinearAdapters
from lorafusion_megatron.lora.autograd import lora_linear
from lorafusion_megatron.lora.reference import TorchBackend
from lorafusion_megatron.lora.routing import RoutedSegment, build_routing
from lorafusion_megatron.types import AdapterSpec

TOKENS, IN, OUT = 23, 12, 18
PROJECTIONS = torch.arange(OUT, dtype=torch.int32) // 6


def _adapter(columns: int, *, rank: int, projections: tuple[int, ...], dropout: float, scaling: float) -> LinearAdapter:
    a, b = torch.randn(columns, IN, dtype=torch.float64), torch.randn(OUT, columns, dtype=torch.float64)
    adapter = LinearAdapter(
        a=a,
        b=b,
        grad_a=torch.zeros_like(a),
        grad_b=torch.zeros_like(b),
        scaling=scaling,
        dropout=dropout,
        projections=projections,
        rank=rank,
    )
    mask = adapter.block_mask(PROJECTIONS)
    if mask is not None:
        b.mul_(mask)
    return adapter


@pytest.fixture
def linear() -> LinearAdapters:
    """Slot 0: per-projection factors of two projections; 2: one shared A; 5: no adapter on this linear."""
    torch.manual_seed(0)
    adapters = LinearAdapters(
        name="decoder.layers.0.self_attention.linear_qkv",
        module_key=77,
        in_features=IN,
        out_features=OUT,
        row_projection=PROJECTIONS,
    )
    adapters.by_slot[0] = _adapter(6, rank=3, projections=(0, 2), dropout=0.25, scaling=1.5)
    adapters.by_slot[2] = _adapter(2, rank=2, projections=(ALL_ROWS,), dropout=0.0, scaling=0.3)
    return adapters


def _routing(segments: list[tuple[int, int, int]], tile: int = 1):
    keys = torch.randint(-(1 << 31), 1 << 31, (TOKENS, 2)).to(torch.int32)
    routed = [RoutedSegment(slot=slot, start=start, stop=stop) for slot, start, stop in segments]
    return build_routing(routed, num_tokens=TOKENS, tile=tile, row_keys=keys)


def test_outputs_and_gradients_are_those_of_autograd_over_the_formula(linear):
    routing = _routing([(2, 0, 7), (0, 7, 15), (5, 15, 20)])
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    anchor = torch.empty(0, requires_grad=True)
    y = lora_linear(x, weight, linear, routing, backend=TorchBackend(), anchor=anchor, bias=bias)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)

    leaf = x.detach().clone().requires_grad_()
    factors = {
        slot: (adapter.a.clone().requires_grad_(), adapter.b.clone().requires_grad_())
        for slot, adapter in linear.by_slot.items()
    }
    want = leaf @ weight.t() + bias
    for slot, rows in ((2, slice(0, 7)), (0, slice(7, 15))):
        adapter, (a, b) = linear.by_slot[slot], factors[slot]
        keep = keep_mask(routing.row_keys[rows], 77, IN, adapter.dropout)
        dropped = torch.where(keep, leaf[rows] * keep_scale(adapter.dropout), 0.0)
        added = torch.zeros(TOKENS, OUT, dtype=torch.float64)
        added[rows] = adapter.scaling * (dropped @ a.t()) @ b.t()
        want = want + added
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    leaves = [leaf, *(factor for pair in factors.values() for factor in pair)]
    grads = torch.autograd.grad(want, leaves, dy)
    torch.testing.assert_close(dx, grads[0], rtol=1e-11, atol=1e-11)
    for index, slot in enumerate(linear.by_slot):
        adapter = linear.by_slot[slot]
        mask = adapter.block_mask(PROJECTIONS)
        grad_b = grads[2 + 2 * index] if mask is None else grads[2 + 2 * index] * mask
        torch.testing.assert_close(adapter.grad_a, grads[1 + 2 * index], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(adapter.grad_b, grad_b, rtol=1e-11, atol=1e-11)


def test_gradients_add_up_over_microbatches_and_touch_no_entry_outside_the_blocks(linear):
    backend, x = TorchBackend(), torch.randn(TOKENS, IN, dtype=torch.float64)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    routing = _routing([(0, 0, TOKENS)])
    anchor = torch.empty(0, requires_grad=True)
    sums = []
    for _ in range(2):
        lora_linear(x, weight, linear, routing, backend=backend, anchor=anchor).sum().backward()
        sums.append(linear.by_slot[0].grad_b.clone())
    torch.testing.assert_close(sums[1], 2 * sums[0], rtol=1e-12, atol=1e-12)
    outside = ~linear.by_slot[0].block_mask(PROJECTIONS)
    assert outside.any()
    assert not sums[1][outside].any()
    assert not linear.by_slot[2].grad_b.any()


def test_an_input_that_needs_no_gradient_still_gives_the_adapters_theirs(linear):
    """Row 2: the first block stands on a frozen embedding."""
    x, weight = torch.randn(TOKENS, IN, dtype=torch.float64), torch.randn(OUT, IN, dtype=torch.float64)
    anchor = torch.empty(0, requires_grad=True)
    routing = _routing([(2, 0, TOKENS)])
    lora_linear(x, weight, linear, routing, backend=TorchBackend(), anchor=anchor).sum().backward()
    assert linear.by_slot[2].grad_a.any()
    assert linear.by_slot[2].grad_b.any()


def test_rows_that_are_not_those_of_the_routing_are_refused(linear):
    """Row 17: a shard of the tokens, as sequence parallelism leaves it, must not be read with the whole's counts."""
    weight, anchor = torch.randn(OUT, IN, dtype=torch.float64), torch.empty(0, requires_grad=True)
    half = torch.randn(TOKENS // 2, IN, dtype=torch.float64)
    with pytest.raises(ValueError, match="got 11 rows but its routing covers 23"):
        lora_linear(half, weight, linear, _routing([(0, 0, TOKENS)]), backend=TorchBackend(), anchor=anchor)


@pytest.mark.parametrize(
    ("segments", "tile", "words"),
    [
        ([(0, 0, 24)], 1, "does not fit"),
        ([(0, 0, 9), (1, 8, 12)], 1, "does not fit"),
        ([(0, 5, 5)], 1, "does not fit"),
        ([(0, 0, 9)], 8, "cuts a tile"),
        ([(0, 4, 8)], 8, "cuts a tile"),
        ([(0, 0, 8), (0, 8, 16)], 8, "share a slot"),
    ],
)
def test_counts_are_checked_against_the_rows_before_anything_is_launched(segments, tile, words):
    with pytest.raises(ValueError, match=words):
        _routing(segments, tile)


def test_the_last_segment_may_end_inside_its_tile():
    assert _routing([(3, 0, 8), (1, 16, TOKENS)], tile=8).tile_slots.tolist() == [3, -1, 1]


@pytest.mark.parametrize(("alpha", "rank"), [(32.0, 24), (1.0, 3), (16.0, 7)])
def test_the_scale_is_not_rounded_to_the_compute_dtype(alpha, rank):
    """Row 16: 32/24 in bf16 is off by 0.26 %."""
    spec = AdapterSpec(name="x", rank=rank, alpha=alpha, target_modules=("q_proj",), seed=0)
    assert spec.scaling == alpha / rank
    rounded = torch.tensor(spec.scaling).bfloat16().item()
    assert abs(rounded / spec.scaling - 1) > 5e-4


def test_the_scale_of_rslora():
    """Row 14: alpha 32 at rank 16 is 2 plain and 8 with rsLoRA."""
    plain, rs = (
        AdapterSpec(name="x", rank=16, alpha=32.0, use_rslora=rs, target_modules=("q_proj",), seed=0).scaling
        for rs in (False, True)
    )
    assert (plain, rs) == (2.0, 8.0)
