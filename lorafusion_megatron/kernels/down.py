"""Dropout and down-projection in one pass over the activation: S = scale * drop(X) Aᵀ, each tile by its own adapter.

The same kernel gives dS = scale * dY B where an adapter is too wide for the joint pass of `dy_pass`.
"""

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, power_of_two
from .masks import keep_signs, keep_where, load_keys
from .overlap import await_predecessor, launch_options
from .tables import FACTOR_A, FIELDS, THRESHOLD, slot_columns, slot_pointer, slot_scale


@triton.jit(do_not_specialize=["tokens", "num_slots", "module_key", "feature_offset"])
def _down_kernel(
    z_ptr, z_stride, out_ptr, out_stride, partial_ptr, counter_ptr, table, tile_slots, keys,
    tokens, width, num_slots, module_key, feature_offset,
    FACTOR: tl.constexpr, DROP: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows by one block of RB columns; the programs of a tile split the features among them."""
    await_predecessor(OVERLAP)
    tile, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tile_slots + tile)
    columns = slot_columns(table, slot, num_slots, ALIGN)
    if block * RB >= columns:
        return
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    factor = slot_pointer(table, slot, FACTOR, dtype, ALIGN)
    rows = tile * TILE + tl.arange(0, TILE)
    valid = rows < tokens
    column = block * RB + tl.arange(0, RB)
    real = column < columns
    if DROP:
        key0, key1 = load_keys(keys, rows, valid)
        bound = tl.load(table + slot.to(tl.int64) * FIELDS + THRESHOLD).to(tl.uint32)
        thresholds = tl.zeros((TILE,), tl.uint32) + bound
    z_rows = z_ptr + rows.to(tl.int64)[:, None] * z_stride
    per_split = tl.cdiv(tl.cdiv(width, BK), SPLITS)
    acc = tl.zeros((TILE, RB), tl.float32)
    for k in tl.range(split * per_split * BK, min((split + 1) * per_split * BK, width), BK):
        feature = k + tl.arange(0, BK)
        inside = feature < width
        z_mask = valid[:, None] if EVEN else valid[:, None] & inside[None, :]
        z = tl.load(z_rows + feature[None, :], mask=z_mask, other=0.0)
        if FACTOR == FACTOR_A:
            f_mask = real[:, None] if EVEN else real[:, None] & inside[None, :]
            at = factor + column.to(tl.int64)[:, None] * width + feature[None, :]
            f = tl.trans(tl.load(at, mask=f_mask, other=0.0))
        else:
            at = factor + feature.to(tl.int64)[:, None] * columns + column[None, :]
            f = tl.load(at, mask=real[None, :] & inside[:, None], other=0.0)
        if DROP:
            signs = keep_signs(key0, key1, thresholds, module_key, feature_offset + k, TILE, BK)
            z = keep_where(signs, z)
        acc = tl.dot(z, f, acc, input_precision=PRECISION)
    store_mask = valid[:, None] & (column < out_stride)[None, :]
    at = rows.to(tl.int64)[:, None] * out_stride + column[None, :]
    if SPLITS > 1:
        # The last program to arrive sums the parts in their order, so the result doesn't depend on who is last.
        plane = tokens.to(tl.int64) * out_stride
        tl.store(partial_ptr + split * plane + at, acc, mask=store_mask)
        tl.debug_barrier()
        counter = counter_ptr + tile * tl.num_programs(1) + block
        if tl.atomic_add(counter, 1) < SPLITS - 1:
            return
        tl.debug_barrier()
        acc = tl.zeros((TILE, RB), tl.float32)
        for part in range(SPLITS):
            acc += tl.load(partial_ptr + part * plane + at, mask=store_mask, other=0.0)
        tl.store(counter, 0)
    tl.store(out_ptr + at, (acc * slot_scale(table, slot)).to(dtype), mask=store_mask)


_launch = Launcher(_down_kernel)


def down(
    z: torch.Tensor,
    table: torch.Tensor,
    tile_slots: torch.Tensor,
    keys: torch.Tensor,
    counters: torch.Tensor,
    *,
    factor: int,
    width: int,
    tile: int,
    module_key: int,
    feature_offset: int,
    drop: bool,
    splits: int,
    align: int,
    overlap: bool,
    block_k: int = 128,
    num_stages: int = 4,
    num_warps: int = 4,
) -> torch.Tensor:
    """``S = scale * drop(z) Fᵀ`` with each tile's own factor.

    Args:
        z: ``[tokens, features]``, rows contiguous.
        table: slot table; its factors and z share the dtype.
        tile_slots: int32 ``[tiles]``.
        keys: int32 ``[tokens, 2]``.
        counters: int32, zeros, at least tiles * blocks of columns; zeros again afterwards.
        factor: `FACTOR_A` (F = A, ``[columns, features]``) or `FACTOR_B` (F = Bᵀ).
        width: columns of the result: the widest adapter's, a multiple of 16.
        tile: rows per tile.
        module_key, feature_offset: of the linear, for the mask; the key as a signed 32-bit value.
        drop: whether any adapter drops.
        splits: programs that share a tile's features.
        align: of `tables.table_alignment`.
        overlap: of `overlap.await_predecessor`.

    Returns:
        ``[tokens, width]``; rows without an adapter and columns past an adapter's own are not written.
    """
    tokens, features = z.shape
    out = z.new_empty(tokens, width)
    rb = min(power_of_two(width), 64)
    blocks = cdiv(width, rb)
    partial = out if splits == 1 else torch.empty(splits, tokens, width, dtype=torch.float32, device=z.device)
    bk = block_k if z.element_size() == 2 else block_k // 2
    _launch(
        (tile_slots.shape[0], blocks, splits),
        (
            z, z.stride(0), out, width, partial, counters, table, tile_slots, keys,
            tokens, features, table.shape[0], module_key, feature_offset,
        ),
        FACTOR=factor, DROP=drop, TILE=tile, BK=bk, RB=rb, SPLITS=splits, EVEN=features % bk == 0,
        ALIGN=align, OVERLAP=overlap, PRECISION="ieee",
        options=launch_options(overlap, num_warps=num_warps, num_stages=num_stages),
    )  # fmt: skip
    return out
