"""The frozen product with the adapter's part in it: Y = X Wᵀ + bias + S Bᵀ, and dX = dY W + mask ∘ (dS A).

A persistent kernel with bulk tensor copies: the adapter's part starts the accumulator of each output tile, so the
large output is written once and never read. Needs compute capability 9.0, 16-bit types and rows that start at
multiples of 16 bytes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .adapter_part import adapter_tile, drop_tile
from .launch import Launcher, cdiv, power_of_two
from .overlap import await_predecessor, launch_options


@dataclass(frozen=True, kw_only=True)
class ProductConfig:
    """Shape of the persistent product's tiles."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 3
    warps: int = 8
    group: int = 8
    """Row blocks that run side by side, so that a block of columns is read from memory once for all of them."""
    halves: bool = True
    """Whether the output tile is stored in two halves, which takes half the shared memory."""


@triton.jit(do_not_specialize=["tokens", "num_slots", "module_key", "feature_offset"])
def _product_kernel(
    z, w, y, bias, q_ptr, q_stride, table, tile_slots, keys,
    tokens, width, inner, num_slots, module_key, feature_offset,
    FACTOR: tl.constexpr, W_BY_OUTPUT: tl.constexpr, DROP: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr,
    SUBTILES: tl.constexpr, ONCE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KC: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr, OVERLAP: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Output tiles a grid apart, in groups of GROUP row blocks so that both operands stay in the cache."""
    await_predecessor(OVERLAP)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    row_blocks, col_blocks = tl.cdiv(tokens, BM), tl.cdiv(width, BN)
    for t in tl.range(tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0)):
        first = t // (GROUP * col_blocks) * GROUP
        size = min(row_blocks - first, GROUP)
        row = (first + (t % (GROUP * col_blocks)) % size) * BM
        col = (t % (GROUP * col_blocks)) // size * BN
        acc = adapter_tile(
            tl.zeros((BM, BN), tl.float32), q_ptr, q_stride, table, tile_slots, row, col, tokens, width, num_slots,
            FACTOR, TILE, SUBTILES, BM, BN, KC, ONCE, ALIGN, "ieee",
        )  # fmt: skip
        if DROP:
            acc = drop_tile(
                acc, table, tile_slots, keys, row, col, tokens, num_slots, module_key, feature_offset, TILE, BM, BN
            )
        for k in tl.range(0, inner, BK):
            lhs = z.load([row, k])
            rhs = w.load([col, k]).T if W_BY_OUTPUT else w.load([k, col])
            acc = tl.dot(lhs, rhs, acc)
        if BIAS:
            at = col + tl.arange(0, BN)
            acc += tl.load(bias + at, mask=at < width, other=0.0).to(tl.float32)[None, :]
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            y.store([row, col], left.to(dtype))
            y.store([row, col + BN // 2], right.to(dtype))
        else:
            y.store([row, col], acc.to(dtype))


_launch = Launcher(_product_kernel)


def product(
    z: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    q: torch.Tensor,
    table: torch.Tensor,
    tile_slots: torch.Tensor,
    keys: torch.Tensor,
    *,
    factor: int,
    tile: int,
    module_key: int,
    feature_offset: int,
    drop: bool,
    align: int,
    overlap: bool,
    config: ProductConfig,
    programs: int,
    pure: bool,
) -> torch.Tensor:
    """``z Wᵀ + bias + q Bᵀ`` (factor B) or ``z W + mask ∘ (q A)`` (factor A).

    Args:
        z: ``[tokens, inner]``: X or dY.
        w: ``[out, in]``, the frozen weight.
        bias: ``[out]`` or None.
        q: ``[tokens, columns]``: S or dS.
        table, tile_slots, keys, tile, module_key, feature_offset, drop, align, overlap: as in `down.down`.
        factor: `FACTOR_B` forward, `FACTOR_A` backward.
        config: of the tiles.
        programs: multiprocessors of the device.
        pure: whether no block of ``config.block_m`` rows holds two adapters.

    Returns:
        ``[tokens, out]`` forward, ``[tokens, in]`` backward.
    """
    forward = factor == 1
    (tokens, inner), width = z.shape, w.shape[0 if forward else 1]
    y = z.new_empty(tokens, width)
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    z_desc = TensorDescriptor.from_tensor(z, [bm, bk])
    w_desc = TensorDescriptor.from_tensor(w, [bn, bk] if forward else [bk, bn])
    y_desc = TensorDescriptor.from_tensor(y, [bm, bn // 2 if config.halves else bn])
    tiles = cdiv(tokens, bm) * cdiv(width, bn)
    programs = min(programs, tiles)
    _launch(
        (programs, 1, 1),
        (
            z_desc, w_desc, y_desc, bias, q, q.shape[1], table, tile_slots, keys,
            tokens, width, inner, table.shape[0], module_key, feature_offset,
        ),
        FACTOR=factor, W_BY_OUTPUT=forward, DROP=drop, BIAS=bias is not None, TILE=tile,
        SUBTILES=1 if pure else bm // tile, ONCE=q.shape[1] <= 64,
        BM=bm, BN=bn, BK=bk, KC=min(power_of_two(q.shape[1]), 64), GROUP=config.group,
        ALIGN=align, OVERLAP=overlap, HALVES=config.halves,
        options=launch_options(overlap, num_warps=config.warps, num_stages=config.stages),
    )  # fmt: skip
    return y
