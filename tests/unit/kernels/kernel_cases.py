"""Random multi-adapter cases and the check that every backend must pass: error against fp32 no more than eager's."""

import random
from dataclasses import dataclass

import torch

from lorafusion_megatron.kernels import dropout
from lorafusion_megatron.lora.adapters import ALL_ROWS, LinearAdapter, LinearAdapters
from lorafusion_megatron.lora.reference import TorchBackend
from lorafusion_megatron.lora.routing import RoutedSegment, Routing, build_routing

TILE = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one linear."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor
    adapters: LinearAdapters
    routing: Routing


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a backend made of a case."""

    y: torch.Tensor
    dx: torch.Tensor
    grads: tuple[torch.Tensor, ...]


def random_keys(num_tokens: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """Keys of ``num_tokens`` tokens of a few samples of one job."""
    position = torch.arange(num_tokens) % 97
    sample = torch.arange(num_tokens) // 97
    constant = torch.ones(num_tokens, dtype=torch.int64)
    return dropout.row_keys(constant * seed, constant * 3, sample, position).to(device)


def random_segments(rng: random.Random, num_tokens: int, slots: list[int]) -> list[RoutedSegment]:
    """Segments on tile borders that leave some rows plain and end, at times, at an odd token count."""
    tiles = -(-num_tokens // TILE)
    cuts = sorted(rng.sample(range(tiles + 1), min(tiles + 1, len(slots) + 1)))
    out = []
    for slot, first, last in zip(rng.sample(slots, len(cuts) - 1), cuts[:-1], cuts[1:], strict=True):
        if rng.random() < 0.85:
            out.append(RoutedSegment(slot=slot, start=first * TILE, stop=min(last * TILE, num_tokens)))
    return out


def random_adapter(
    rng: random.Random, size: tuple[int, int], projections: int, dtype: torch.dtype, device: str, ranks: list[int]
) -> LinearAdapter:
    """An adapter whose B keeps to its blocks and whose gradients already hold something."""
    in_features, out_features = size
    rank = rng.choice(ranks)
    own = (ALL_ROWS,) if projections == 1 or rng.random() < 0.3 else tuple(sorted(rng.sample(range(projections), 2)))
    columns = rank * len(own)
    return LinearAdapter(
        a=(torch.randn(columns, in_features) / in_features**0.5).to(device, dtype),
        b=(torch.randn(out_features, columns) / columns**0.5).to(device, dtype),
        grad_a=torch.randn(columns, in_features).to(device),
        grad_b=torch.randn(out_features, columns).to(device),
        scaling=rng.choice([0.5, 1.7, 2.0, 16.0 / 3.0]),
        dropout=rng.choice([0.0, 0.1, 0.5]),
        projections=own,
        rank=rank,
    )


def random_case(
    seed: int,
    *,
    tokens: int,
    size: tuple[int, int],
    slots: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    ranks: list[int] | None = None,
    projections: int = 1,
    bias: bool = False,
    feature_offset: int = 0,
) -> Case:
    """One linear with ``slots`` adapters, one of which is missing here, and a random routing over all of them."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    in_features, out_features = size
    row_projection = None
    if projections > 1:
        row_projection = torch.arange(out_features, dtype=torch.int32, device=device) * projections // out_features
    adapters = LinearAdapters(
        name="decoder.layers.0.mlp.linear_fc1",
        module_key=rng.getrandbits(32),
        in_features=in_features,
        out_features=out_features,
        feature_offset=feature_offset,
        row_projection=row_projection,
    )
    names = rng.sample(range(3 * slots), slots)
    for slot in names[: max(1, slots - 1)]:
        adapter = random_adapter(rng, size, projections, dtype, device, ranks or [1, 3, 8, 16, 20])
        mask = adapter.block_mask(row_projection)
        if mask is not None:
            adapter.b.mul_(mask)
        adapters.by_slot[slot] = adapter
    routing = build_routing(
        random_segments(rng, tokens, names), num_tokens=tokens, tile=TILE, row_keys=random_keys(tokens, seed, device)
    )
    return Case(
        x=torch.randn(tokens, in_features).to(device, dtype),
        weight=(torch.randn(out_features, in_features) / in_features**0.5).to(device, dtype),
        bias=torch.randn(out_features).to(device, dtype) if bias else None,
        dy=torch.randn(tokens, out_features).to(device, dtype),
        adapters=adapters,
        routing=routing,
    )


def as_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same numbers in another dtype, with gradient buffers of their own."""
    by_slot = {
        slot: LinearAdapter(
            a=adapter.a.to(dtype),
            b=adapter.b.to(dtype),
            grad_a=adapter.grad_a.to(torch.promote_types(dtype, torch.float32), copy=True),
            grad_b=adapter.grad_b.to(torch.promote_types(dtype, torch.float32), copy=True),
            scaling=adapter.scaling,
            dropout=adapter.dropout,
            projections=adapter.projections,
            rank=adapter.rank,
        )
        for slot, adapter in case.adapters.by_slot.items()
    }
    old = case.adapters
    adapters = LinearAdapters(
        name=old.name,
        module_key=old.module_key,
        in_features=old.in_features,
        out_features=old.out_features,
        feature_offset=old.feature_offset,
        row_projection=old.row_projection,
        by_slot=by_slot,
    )
    bias = None if case.bias is None else case.bias.to(dtype)
    return Case(
        x=case.x.to(dtype),
        weight=case.weight.to(dtype),
        bias=bias,
        dy=case.dy.to(dtype),
        adapters=adapters,
        routing=case.routing,
    )


def run(backend, case: Case) -> Result:
    """Forward and backward; gradients are what was added."""
    before = [(a.grad_a.clone(), a.grad_b.clone()) for a in case.adapters.by_slot.values()]
    y, s = backend.forward(case.x, case.weight, case.bias, case.adapters, case.routing)
    dx = backend.backward(case.dy, case.x, case.weight, s, case.adapters, case.routing, needs_dx=True)
    grads = []
    for adapter, (a, b) in zip(case.adapters.by_slot.values(), before, strict=True):
        grads += [adapter.grad_a - a, adapter.grad_b - b]
    return Result(y=y, dx=dx, grads=tuple(grads))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """``|got - want| / |want|``; NaN and infinities count as infinitely wrong."""
    got, want = got.double(), want.double()
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def worst_ratio(backend, case: Case) -> float:
    """The largest error against fp64 over that of the PyTorch backend in the same dtype.

    Note: errors below that of rounding once (2^-9 in bfloat16, 2^-12 in float16; 2e-6 in fp32, for the order of
    sums) count as equal to it: on a few numbers eager can be luckier than that.
    """
    exact = run(TorchBackend(), as_dtype(case, torch.float64))
    eager = run(TorchBackend(), as_dtype(case, case.x.dtype))
    got = run(backend, case)
    return largest_ratio(*((result.y, result.dx, *result.grads) for result in (got, eager, exact)), case.x.dtype)


def largest_ratio(
    got: tuple[torch.Tensor, ...],
    eager: tuple[torch.Tensor, ...],
    exact: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
) -> float:
    """The largest ratio of `worst_ratio` over results that all have a counterpart."""
    floor = {torch.float32: 2e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]
    ratios = []
    for mine, theirs, want in zip(got, eager, exact, strict=True):
        if not want.any():
            assert not mine.any(), "gradient of an adapter that has no rows"
            continue
        ratios.append(relative(mine, want) / max(floor, relative(theirs, want)))
    return max(ratios)


def masks_drawn(backend, keys: torch.Tensor, *, module_key: int, p: float, feature_offset: int, dtype: torch.dtype):
    """The masks that a backend draws in its three passes, read off with unit factors: bool ``[64, 128]`` each.

    With A, B and dY units and X ones, S is the forward's mask, dA that of the pass for A's gradient and, with a zero
    weight and dY ones, dX that of the backward's product.
    """
    device, size = keys.device, 128
    eye = torch.eye(size, device=device, dtype=dtype)
    adapter = LinearAdapter(
        a=eye.clone(),
        b=eye.clone(),
        grad_a=torch.zeros(size, size, device=device),
        grad_b=torch.zeros(size, size, device=device),
        scaling=1.0,
        dropout=p,
        projections=(ALL_ROWS,),
        rank=size,
    )
    adapters = LinearAdapters(
        name="masks",
        module_key=module_key,
        in_features=size,
        out_features=size,
        feature_offset=feature_offset,
        by_slot={0: adapter},
    )
    rows = keys.shape[0]
    routing = build_routing(
        [RoutedSegment(slot=0, start=0, stop=rows)], num_tokens=rows, tile=backend.tile, row_keys=keys
    )
    x = torch.ones(rows, size, device=device, dtype=dtype)
    _, s = backend.forward(x, eye, None, adapters, routing)
    backend.backward(eye[:rows].contiguous(), x, eye, s, adapters, routing, needs_dx=True)
    from_grad = adapter.grad_a[:rows] != 0
    dx = backend.backward(x, x, torch.zeros_like(eye), s, adapters, routing, needs_dx=True)
    return s[:, :size] != 0, from_grad, dx != 0
