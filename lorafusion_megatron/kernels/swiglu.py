"""SwiGLU between a block's two MLP linears, with the adapters' passes over what it reads and writes.

    act = silu(gate) * up,   silu(x) = x * sigmoid(x),   [gate | up] = y of linear_fc1

Forward, one kernel: act, and S = scale * drop(act) Aᵀ of linear_fc2. Backward, one kernel: d gate and d up, dS and dB
of linear_fc1, which would be a pass over them, and dA of linear_fc2, which would be a pass over act; act is computed
again there and need not be kept. All of it rides on the bytes that the activation moves anyway.
"""

import torch
import triton
import triton.language as tl

from .dy_pass import sum_strips
from .factor_grad import add_gradient
from .launch import Launcher, power_of_two
from .masks import NVIDIA, computed_once, keep_signs, keep_where, load_keys
from .overlap import await_predecessor, launch_options
from .tables import (
    CHUNK_FIELDS,
    FACTOR_A,
    FACTOR_B,
    FIELDS,
    GRAD_A,
    GRAD_B,
    THRESHOLD,
    slot_columns,
    slot_pointer,
    slot_scale,
)


@triton.jit
def _sigmoid(x):
    """``1 / (1 + exp(-x))`` of fp32: relative error 2e-7 for x above -1, growing to 2e-6 at x = -16.

    Note: Triton's exponential and division guard denormal numbers and ranges that don't occur here, 8 instructions
    of the 50 that an element takes.
    """
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, e; }",  # the first number is -log2(e), the second 1
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["tokens", "num_slots", "module_key", "feature_offset"])
def _swiglu_down_kernel(
    y_ptr, y_stride, act_ptr, s_ptr, s_stride, partial_ptr, counter_ptr, table, tile_slots, keys,
    tokens, width, num_slots, module_key, feature_offset,
    DROP: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr, SPLITS: tl.constexpr,
    ALIGN: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows; the programs of a tile split the features among them. RB covers the widest adapter."""
    await_predecessor(OVERLAP)
    tile, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tile_slots + tile)
    columns = slot_columns(table, slot, num_slots, ALIGN)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    # Slot 0 stands in where there is no adapter: no column of it is then read.
    known = tl.where(columns > 0, slot, 0)
    factor = slot_pointer(table, known, FACTOR_A, dtype, ALIGN)
    rows = tile * TILE + tl.arange(0, TILE)
    valid = rows < tokens
    column = tl.arange(0, RB)
    real = column < columns
    if DROP:
        key0, key1 = load_keys(keys, rows, valid)
        bound = tl.load(table + known.to(tl.int64) * FIELDS + THRESHOLD).to(tl.uint32)
        thresholds = tl.zeros((TILE,), tl.uint32) + bound
    y_rows = y_ptr + rows.to(tl.int64)[:, None] * y_stride
    act_rows = act_ptr + rows.to(tl.int64)[:, None] * width
    per_split = tl.cdiv(width // BK, SPLITS)
    acc = tl.zeros((TILE, RB), tl.float32)
    for k in tl.range(split * per_split * BK, min((split + 1) * per_split * BK, width), BK):
        feature = k + tl.arange(0, BK)
        gate = tl.load(y_rows + feature[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        up = tl.load(y_rows + width + feature[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        act = (gate * _sigmoid(gate) * up).to(dtype)
        tl.store(act_rows + feature[None, :], act, mask=valid[:, None])
        at = factor + column.to(tl.int64)[:, None] * width + feature[None, :]
        f = tl.trans(tl.load(at, mask=real[:, None], other=0.0))
        if DROP:
            act = keep_where(keep_signs(key0, key1, thresholds, module_key, feature_offset + k, TILE, BK), act)
        acc = tl.dot(act, f, acc, input_precision=PRECISION)
    if columns == 0:
        return
    store_mask = valid[:, None] & (column < s_stride)[None, :]
    at = rows.to(tl.int64)[:, None] * s_stride + column[None, :]
    if SPLITS > 1:
        # As in `down`: the last program to arrive sums the parts in their order.
        plane = tokens.to(tl.int64) * s_stride
        tl.store(partial_ptr + split * plane + at, acc, mask=store_mask)
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + tile, 1) < SPLITS - 1:
            return
        tl.debug_barrier()
        acc = tl.zeros((TILE, RB), tl.float32)
        for part in range(SPLITS):
            acc += tl.load(partial_ptr + part * plane + at, mask=store_mask, other=0.0)
        tl.store(counter_ptr + tile, 0)
    tl.store(s_ptr + at, (acc * slot_scale(table, slot)).to(dtype), mask=store_mask)


@triton.jit(do_not_specialize=["tokens", "num_slots1", "num_slots2", "module_key", "feature_offset"])
def _swiglu_grad_kernel(
    y_ptr, y_stride, d_act_ptr, dy_ptr, s_ptr, s_stride, ds2_ptr, ds2_stride, parts_ptr,
    partial_b, partial_a, counter_ptr, table1, table2, chunks, row_projection, keys,
    tokens, width, num_slots1, num_slots2, module_key, feature_offset,
    DROP: tl.constexpr, PROJECTED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, RB1: tl.constexpr,
    RB2: tl.constexpr, ALIGN1: tl.constexpr, ALIGN2: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of rows by BN features of gate and the same of up; RB1 and RB2 cover the widest adapters.

    Table 1 and its fields are linear_fc1's, table 2 and its fields, ds2, keys, module_key linear_fc2's.
    """
    await_predecessor(OVERLAP)
    strip, chunk = tl.program_id(0), tl.program_id(1)
    entry = chunks + chunk * CHUNK_FIELDS
    slot, start, stop = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    part, parts = tl.load(entry + 3), tl.load(entry + 4)
    columns1 = slot_columns(table1, slot, num_slots1, ALIGN1)
    columns2 = slot_columns(table2, slot, num_slots2, ALIGN2)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    feature = strip * BN + tl.arange(0, BN)
    column1, column2 = tl.arange(0, RB1), tl.arange(0, RB2)
    real1, real2 = column1 < columns1, column2 < columns2
    b_at = slot_pointer(table1, tl.where(columns1 > 0, slot, 0), FACTOR_B, dtype, ALIGN1)
    b_at += feature.to(tl.int64)[:, None] * columns1 + column1[None, :]
    b_gate = tl.load(b_at, mask=real1[None, :], other=0.0)
    b_up = tl.load(b_at + tl.cast(width, tl.int64) * columns1, mask=real1[None, :], other=0.0)
    if DROP:
        bound = tl.load(table2 + tl.where(columns2 > 0, slot, 0).to(tl.int64) * FIELDS + THRESHOLD).to(tl.uint32)
        thresholds = tl.zeros((BT,), tl.uint32) + bound
    acc_gate = tl.zeros((BN, RB1), tl.float32)
    acc_up = tl.zeros((BN, RB1), tl.float32)
    acc_a = tl.zeros((BN, RB2), tl.float32)
    parts_at = parts_ptr + strip.to(tl.int64) * tokens * RB1
    for first in tl.range(start, stop, BT, num_stages=STAGES):
        rows = first + tl.arange(0, BT)
        valid = rows < stop
        wide = rows.to(tl.int64)[:, None]
        mask = valid[:, None]
        y_at = y_ptr + wide * y_stride + feature[None, :]
        gate = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(y_at + width, mask=mask, other=0.0).to(tl.float32)
        d_act = tl.load(d_act_ptr + wide * width + feature[None, :], mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + wide * s_stride + column1[None, :], mask=valid[:, None] & real1[None, :], other=0.0)
        ds2 = tl.load(ds2_ptr + wide * ds2_stride + column2[None, :], mask=valid[:, None] & real2[None, :], other=0.0)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        d_up = computed_once((d_act * silu).to(dtype))
        d_gate = computed_once((d_act * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype))
        act = computed_once((silu * up).to(dtype))
        dy_at = dy_ptr + wide * (2 * tl.cast(width, tl.int64)) + feature[None, :]
        tl.store(dy_at, d_gate, mask=mask)
        tl.store(dy_at + width, d_up, mask=mask)
        if DROP:
            key0, key1 = load_keys(keys, rows, valid)
            signs = keep_signs(key0, key1, thresholds, module_key, feature_offset + strip * BN, BT, BN)
            act = keep_where(signs, act)
        acc_gate = tl.dot(tl.trans(d_gate), s, acc_gate, input_precision=PRECISION)
        acc_up = tl.dot(tl.trans(d_up), s, acc_up, input_precision=PRECISION)
        acc_a = tl.dot(tl.trans(act), ds2, acc_a, input_precision=PRECISION)
        # Two sums: loads that one product of a chain and the next both need would not be fetched ahead.
        ds = tl.dot(d_gate, b_gate, input_precision=PRECISION) + tl.dot(d_up, b_up, input_precision=PRECISION)
        tl.store(parts_at + wide * RB1 + column1[None, :], ds, mask=valid[:, None] & real1[None, :])
    if slot < 0:
        return
    strips = tl.num_programs(0)
    counter_at = 3 * ((chunk - part) * strips + strip)
    if columns1 > 0:
        add_gradient(
            acc_gate, partial_b, counter_ptr, table1, slot, chunk, part, parts, feature, column1, 2 * width, columns1,
            RB1, counter_at, row_projection, GRAD_B, PROJECTED, BN, RB1, ALIGN1,
        )  # fmt: skip
        add_gradient(
            acc_up, partial_b, counter_ptr, table1, slot, chunk, part, parts, feature + width, column1, 2 * width,
            columns1, RB1, counter_at + 1, row_projection, GRAD_B, PROJECTED, BN, RB1, ALIGN1,
        )  # fmt: skip
    if columns2 > 0:
        add_gradient(
            acc_a, partial_a, counter_ptr, table2, slot, chunk, part, parts, feature, column2, width, columns2,
            RB2, counter_at + 2, row_projection, GRAD_A, False, BN, RB2, ALIGN2,
        )  # fmt: skip


_launch, _launch_grad = Launcher(_swiglu_down_kernel), Launcher(_swiglu_grad_kernel)


def swiglu_down(
    y: torch.Tensor,
    table: torch.Tensor,
    tile_slots: torch.Tensor,
    keys: torch.Tensor,
    counters: torch.Tensor,
    *,
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
    num_warps: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``act = silu(gate) * up`` and ``S = scale * drop(act) Aᵀ`` of linear_fc2.

    Args:
        y: ``[tokens, 2 * features]``, gate before up, rows contiguous; the features divide by 16.
        table, tile_slots, keys, counters, tile, module_key, feature_offset, drop, splits, align, overlap: of
            linear_fc2, as in `down.down`.
        width: columns of S, at most 64, a multiple of 16.

    Returns:
        act ``[tokens, features]`` and S ``[tokens, width]``; rows of S without an adapter and columns past an adapter's
        own are not written.
    """
    tokens, features = y.shape[0], y.shape[1] // 2
    act, s = y.new_empty(tokens, features), y.new_empty(tokens, width)
    partial = s if splits == 1 else torch.empty(splits, tokens, width, dtype=torch.float32, device=y.device)
    bk = divisor(features, block_k if y.element_size() == 2 else block_k // 2)
    _launch(
        (tile_slots.shape[0], splits, 1),
        (
            y, y.stride(0), act, s, width, partial, counters, table, tile_slots, keys,
            tokens, features, table.shape[0], module_key, feature_offset,
        ),
        DROP=drop, TILE=tile, BK=bk, RB=power_of_two(width), SPLITS=splits, ALIGN=align, OVERLAP=overlap,
        PRECISION="ieee", options=launch_options(overlap, num_warps=num_warps, num_stages=num_stages),
    )  # fmt: skip
    return act, s


def swiglu_grad(
    y: torch.Tensor,
    d_act: torch.Tensor,
    s: torch.Tensor,
    ds2: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    chunks: torch.Tensor,
    tile_slots: torch.Tensor,
    keys: torch.Tensor,
    counters: torch.Tensor,
    *,
    row_projection: torch.Tensor | None,
    tile: int,
    module_key: int,
    feature_offset: int,
    drop: bool,
    split: bool,
    aligns: tuple[int, int],
    overlap: bool,
    block_n: int = 128,
    block_t: int = 32,
    num_stages: int = 3,
    num_warps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What lies between d act and d y, with linear_fc1's dS and dB and linear_fc2's dA.

        d up = d act * silu(gate),   d gate = d act * up * (sigmoid(gate) + silu(gate) * (1 - sigmoid(gate)))
        dS1 = scale * [d gate | d up] B1;   dB1 += [d gate | d up]ᵀ S1;   dA2 += dS2ᵀ drop(act)

    Args:
        y: ``[tokens, 2 * features]`` of the forward, gate before up; the features divide by 16.
        d_act: ``[tokens, features]``, contiguous: the gradient of linear_fc2's input.
        s: ``[tokens, width]`` of linear_fc1's forward, scaled; at most 64 columns.
        ds2: ``[tokens, width]`` of linear_fc2, scaled; at most 64 columns.
        tables: slot tables of linear_fc1 and linear_fc2.
        chunks: chunk table over all rows: those without an adapter in slot -1.
        tile_slots, tile: as in `dy_pass.dy_pass`.
        keys, module_key, feature_offset, drop: linear_fc2's, as in `down.down`.
        counters: int32, zeros, at least three times chunks * strips; zeros again afterwards.
        row_projection: linear_fc1's.
        split: whether any rows of one slot are cut into several chunks.
        aligns: of `tables.table_alignment`, of both tables.
        overlap: of `overlap.await_predecessor`.

    Returns:
        dy ``[tokens, 2 * features]`` and dS1 ``[tokens, width]``, as in `dy_pass.dy_pass`.
    """
    tokens, features = d_act.shape
    rb1, rb2 = power_of_two(s.shape[1]), power_of_two(ds2.shape[1])
    wide = y.element_size() == 4
    bn, bt = divisor(features, block_n // 2 if wide else block_n), block_t // 2 if wide else block_t
    strips = features // bn
    dy = y.new_empty(tokens, 2 * features)
    parts = torch.empty(strips, tokens, rb1, dtype=torch.float32, device=y.device)
    partial_b = partial_a = parts
    if split:
        partial_b = torch.empty(chunks.shape[0], 2 * features, rb1, dtype=torch.float32, device=y.device)
        partial_a = torch.empty(chunks.shape[0], features, rb2, dtype=torch.float32, device=y.device)
    _launch_grad(
        (strips, chunks.shape[0], 1),
        (
            y, y.stride(0), d_act, dy, s, s.shape[1], ds2, ds2.shape[1], parts,
            partial_b, partial_a, counters, *tables, chunks, row_projection, keys,
            tokens, features, tables[0].shape[0], tables[1].shape[0], module_key, feature_offset,
        ),
        DROP=drop, PROJECTED=row_projection is not None, BT=bt, BN=bn, RB1=rb1, RB2=rb2,
        ALIGN1=aligns[0], ALIGN2=aligns[1], OVERLAP=overlap, STAGES=num_stages, PRECISION="ieee",
        options=launch_options(overlap, num_warps=num_warps, num_stages=num_stages),
    )  # fmt: skip
    return dy, sum_strips(parts, s, tables[0], tile_slots, tile=tile, align=aligns[0], overlap=overlap)


def divisor(features: int, most: int) -> int:
    """The largest power of two that divides the features, up to ``most``."""
    return min(most, features & -features)
