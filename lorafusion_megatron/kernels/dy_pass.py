"""One pass over dY for both its products: dS = scale * dY B and dB += dYᵀ S.

A program owns a strip of output features and a chunk of rows: it keeps its part of dB in registers and writes its
part of dS, which a second small kernel sums over the strips in order (so results repeat to the last bit, as sums by
atomics do not). Reading dY twice would cost its size again; the parts of dS cost 4 * columns / BN of it, written and
read, so wide adapters take two passes instead.
"""

import torch
import triton
import triton.language as tl

from .factor_grad import add_gradient
from .launch import Launcher, cdiv, power_of_two
from .overlap import await_predecessor, launch_options
from .tables import CHUNK_FIELDS, FACTOR_B, GRAD_B, slot_columns, slot_pointer, slot_scale

SUMMED = 4096
"""Numbers that a program of `sum_strips` loads at once."""


@triton.jit(do_not_specialize=["tokens", "num_slots"])
def _dy_kernel(
    dy_ptr, dy_stride, s_ptr, s_stride, parts_ptr, partial_ptr, counter_ptr, table, chunks, row_projection,
    tokens, width, num_slots,
    PROJECTED: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, RB: tl.constexpr,
    ALIGN: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of rows by one strip of BN features; RB covers the widest adapter."""
    await_predecessor(OVERLAP)
    strip, chunk = tl.program_id(0), tl.program_id(1)
    entry = chunks + chunk * CHUNK_FIELDS
    slot, start, stop = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    part, parts = tl.load(entry + 3), tl.load(entry + 4)
    columns = slot_columns(table, slot, num_slots, ALIGN)
    if columns == 0:
        return
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    feature = strip * BN + tl.arange(0, BN)
    column = tl.arange(0, RB)
    real = column < columns
    b_at = slot_pointer(table, slot, FACTOR_B, dtype, ALIGN) + feature.to(tl.int64)[:, None] * columns + column[None, :]
    b = tl.load(b_at, mask=(feature < width)[:, None] & real[None, :], other=0.0)
    acc = tl.zeros((BN, RB), tl.float32)
    parts_at = parts_ptr + strip.to(tl.int64) * tokens * RB
    for first in tl.range(start, stop, BT):
        rows = first + tl.arange(0, BT)
        valid = rows < stop
        dy_mask = valid[:, None] if EVEN else valid[:, None] & (feature < width)[None, :]
        dy = tl.load(dy_ptr + rows.to(tl.int64)[:, None] * dy_stride + feature[None, :], mask=dy_mask, other=0.0)
        s_at = s_ptr + rows.to(tl.int64)[:, None] * s_stride + column[None, :]
        s = tl.load(s_at, mask=valid[:, None] & real[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy), s, acc, input_precision=PRECISION)
        ds = tl.dot(dy, b, input_precision=PRECISION)
        tl.store(parts_at + rows.to(tl.int64)[:, None] * RB + column[None, :], ds, mask=valid[:, None] & real[None, :])
    counter_at = (chunk - part) * tl.num_programs(0) + strip
    add_gradient(
        acc, partial_ptr, counter_ptr, table, slot, chunk, part, parts, feature, column, width, columns, RB,
        counter_at, row_projection, GRAD_B, PROJECTED, BN, RB, ALIGN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "num_slots", "strips"])
def _sum_strips_kernel(
    parts_ptr, ds_ptr, ds_stride, table, tile_slots, tokens, num_slots, strips,
    TILE: tl.constexpr, ROWS: tl.constexpr, RB: tl.constexpr, AT_ONCE: tl.constexpr, ALIGN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """ROWS rows of dS: the strips' parts summed in a fixed order, AT_ONCE side by side, scaled, rounded once."""
    await_predecessor(OVERLAP)
    first = tl.program_id(0) * ROWS
    slot = tl.load(tile_slots + first // TILE)
    columns = slot_columns(table, slot, num_slots, ALIGN)
    if columns == 0:
        return
    rows, column = first + tl.arange(0, ROWS), tl.arange(0, RB)
    strip = tl.arange(0, AT_ONCE)
    valid = (rows < tokens)[:, None] & (column < columns)[None, :]
    at = rows.to(tl.int64)[:, None] * RB + column[None, :]
    acc = tl.zeros((AT_ONCE, ROWS, RB), tl.float32)
    plane = tokens.to(tl.int64) * RB
    parts_at = parts_ptr + strip.to(tl.int64)[:, None, None] * plane + at[None, :, :]
    for done in tl.range(0, strips, AT_ONCE):
        mask = (strip < strips - done)[:, None, None] & valid[None, :, :]
        acc += tl.load(parts_at + done * plane, mask=mask, other=0.0)
    out = ds_ptr + rows.to(tl.int64)[:, None] * ds_stride + column[None, :]
    tl.store(out, (tl.sum(acc, 0) * slot_scale(table, slot)).to(ds_ptr.dtype.element_ty), mask=valid)


_launch, _launch_sum = Launcher(_dy_kernel), Launcher(_sum_strips_kernel)


def dy_pass(
    dy: torch.Tensor,
    s: torch.Tensor,
    table: torch.Tensor,
    chunks: torch.Tensor,
    tile_slots: torch.Tensor,
    counters: torch.Tensor,
    *,
    row_projection: torch.Tensor | None,
    tile: int,
    split: bool,
    align: int,
    overlap: bool,
    block_n: int = 256,
    block_t: int = 64,
    num_stages: int = 3,
    num_warps: int = 8,
) -> torch.Tensor:
    """``dS = scale * dY B`` and, added to the fp32 gradients in place, ``dB += dYᵀ S``.

    Args:
        dy: ``[tokens, out]``, rows contiguous.
        s: ``[tokens, width]`` of the forward, scaled.
        table, chunks, tile_slots, counters, row_projection, split, align, overlap: as in `factor_grad.factor_grad`.
        tile: rows per tile.

    Returns:
        dS ``[tokens, width]``; rows without an adapter and columns past an adapter's own are not written.

    Note: temporary memory is 4 * tokens * width * out / block_n bytes, an eighth of dY at 16 columns and half of it
    at 64; each adapter's own columns alone are written and read.
    """
    (tokens, out_features), width = dy.shape, s.shape[1]
    rb = power_of_two(width)
    bn, bt = (block_n, block_t) if dy.element_size() == 2 else (block_n // 4, block_t // 2)
    strips = cdiv(out_features, bn)
    parts = torch.empty(strips, tokens, rb, dtype=torch.float32, device=dy.device)
    partial = parts
    if split:
        partial = torch.empty(chunks.shape[0], out_features, rb, dtype=torch.float32, device=dy.device)
    _launch(
        (strips, chunks.shape[0], 1),
        (
            dy, dy.stride(0), s, width, parts, partial, counters, table, chunks, row_projection,
            tokens, out_features, table.shape[0],
        ),
        PROJECTED=row_projection is not None, EVEN=out_features % bn == 0, BT=bt, BN=bn, RB=rb,
        ALIGN=align, OVERLAP=overlap, PRECISION="ieee",
        options=launch_options(overlap, num_warps=num_warps, num_stages=num_stages),
    )  # fmt: skip
    return sum_strips(parts, s, table, tile_slots, tile=tile, align=align, overlap=overlap)


def sum_strips(
    parts: torch.Tensor,
    s: torch.Tensor,
    table: torch.Tensor,
    tile_slots: torch.Tensor,
    *,
    tile: int,
    align: int,
    overlap: bool,
) -> torch.Tensor:
    """dS, shaped like S: its parts ``[strips, tokens, columns]``, summed in a fixed order and scaled.

    Note: several strips at once keep enough loads under way: of Qwen2.5 32B's linear_fc1 there are 216 kB of parts for
    a program's 16 rows, one strip after another.
    """
    strips, tokens, rb = parts.shape
    ds = torch.empty_like(s)
    rows = 16
    _launch_sum(
        (cdiv(tokens, rows), 1, 1),
        (parts, ds, s.shape[1], table, tile_slots, tokens, table.shape[0], strips),
        TILE=tile, ROWS=rows, RB=rb, AT_ONCE=max(1, SUMMED // (rows * rb)), ALIGN=align, OVERLAP=overlap,
        options=launch_options(overlap, num_warps=4),
    )  # fmt: skip
    return ds
