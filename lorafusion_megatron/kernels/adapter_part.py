"""The adapter's share of an output tile, ``mask ∘ (Q F)``: what both ways of adding it to the frozen product use."""

import triton
import triton.language as tl

from .masks import keep_signs, keep_where, load_keys
from .tables import FACTOR_A, FIELDS, THRESHOLD, slot_columns, slot_pointer


@triton.jit
def _add_columns(
    acc, q_ptr, q_stride, factor, first, columns, rows, own, col, width,
    FACTOR: tl.constexpr, KC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + Q F`` over KC columns of one adapter, for the rows that are its own."""
    column = first + tl.arange(0, KC)
    real = column < columns
    q_at = q_ptr + rows.to(tl.int64)[:, None] * q_stride + column[None, :]
    q = tl.load(q_at, mask=own[:, None] & real[None, :], other=0.0)
    if FACTOR == FACTOR_A:
        at = factor + column.to(tl.int64)[:, None] * width + col[None, :]
        f = tl.load(at, mask=real[:, None] & (col < width)[None, :], other=0.0)
    else:
        at = factor + col.to(tl.int64)[:, None] * columns + column[None, :]
        f = tl.trans(tl.load(at, mask=(col < width)[:, None] & real[None, :], other=0.0))
    return tl.dot(q, f, acc, input_precision=PRECISION)


@triton.jit
def adapter_tile(
    acc, q_ptr, q_stride, table, tile_slots, first_row, first_col, tokens, width, num_slots,
    FACTOR: tl.constexpr, TILE: tl.constexpr, SUBTILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KC: tl.constexpr, ONCE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + Q F`` for BM rows by BN output features, F of each row's own adapter.

    Args:
        acc: fp32 ``[BM, BN]``.
        q_ptr: ``[tokens, q_stride]``: S (F = Bᵀ) or dS (F = A).
        first_row: a multiple of TILE.
        width: output features.
        SUBTILES: tiles of a block that may differ in their adapter: 1 where no block of BM rows is mixed.
        ONCE: whether KC columns hold the widest adapter.

    Note: a block of BM rows may hold several adapters; each enters with the other rows zeroed, so the tile that
    jobs are padded to is independent of the block that suits the matrix unit.
    """
    rows = first_row + tl.arange(0, BM)
    col = first_col + tl.arange(0, BN)
    row_slots = tl.load(tile_slots + rows // TILE, mask=rows < tokens, other=-1)
    previous = tl.full((), -1, tl.int32)
    for sub in tl.static_range(SUBTILES):
        row = first_row + sub * TILE
        slot = tl.load(tile_slots + row // TILE, mask=row < tokens, other=-1)
        columns = tl.where(slot == previous, 0, slot_columns(table, slot, num_slots, ALIGN))
        previous = slot
        own = (row_slots == slot) & (rows < tokens)
        # Slot 0 stands in where there is no adapter: no column of it is then read.
        factor = slot_pointer(table, tl.where(columns > 0, slot, 0), FACTOR, q_ptr.dtype.element_ty, ALIGN)
        if ONCE and SUBTILES == 1:
            acc = _add_columns(acc, q_ptr, q_stride, factor, 0, columns, rows, own, col, width, FACTOR, KC, PRECISION)
        else:
            for k in tl.range(0, columns, KC, num_stages=1):
                acc = _add_columns(
                    acc, q_ptr, q_stride, factor, k, columns, rows, own, col, width, FACTOR, KC, PRECISION
                )
    return acc


@triton.jit
def drop_tile(
    acc, table, tile_slots, keys, first_row, first_col, tokens, num_slots, module_key, feature_offset,
    TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Zero the dropped elements of ``acc [BM, BN]``, each row under its own adapter's threshold."""
    rows = first_row + tl.arange(0, BM)
    valid = rows < tokens
    slots = tl.load(tile_slots + rows // TILE, mask=valid, other=-1)
    known = (slots >= 0) & (slots < num_slots)
    at = table + slots.to(tl.int64) * FIELDS + THRESHOLD
    thresholds = tl.load(at, mask=known, other=0).to(tl.uint32)
    key0, key1 = load_keys(keys, rows, valid)
    signs = keep_signs(key0, key1, thresholds, module_key, feature_offset + first_col, BM, BN)
    return keep_where(signs, acc)
