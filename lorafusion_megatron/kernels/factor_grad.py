"""Gradients of the factors: dA += dSᵀ drop(X) and dB += dYᵀ S, one pass over the large matrix, into fp32 buffers."""

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, power_of_two
from .masks import keep_signs, keep_where, load_keys
from .overlap import await_predecessor, launch_options, outlast_predecessor
from .tables import (
    CHUNK_FIELDS,
    FIELDS,
    GRAD_A,
    THRESHOLD,
    column_projections,
    slot_columns,
    slot_pointer,
)


@triton.jit
def add_gradient(
    acc, partial_ptr, counter_ptr, table, slot, chunk, part, parts, feature, column, width, columns, partial_width,
    counter_at, row_projection, GRAD: tl.constexpr, PROJECTED: tl.constexpr, BN: tl.constexpr, RB: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Add ``acc [features, columns]`` to a factor's gradient; of several parts the last to arrive adds them all.

    Note: the parts are summed in their order, whoever is last, and one program alone touches an element of the
    gradient, so the result is the same from run to run.
    """
    inside = (feature < width)[:, None] & (column < columns)[None, :]
    if parts > 1:
        at = feature.to(tl.int64)[:, None] * partial_width + column[None, :]
        plane = tl.cast(width, tl.int64) * partial_width
        tl.store(partial_ptr + chunk * plane + at, acc, mask=inside)
        tl.debug_barrier()
        ticket = tl.atomic_add(counter_ptr + counter_at, 1)
        tl.debug_barrier()
        last = ticket == parts - 1
        acc = tl.zeros((BN, RB), tl.float32)
        first = chunk - part
        for other in range(0, tl.where(last, parts, 0)):
            acc += tl.load(partial_ptr + (first + other) * plane + at, mask=inside, other=0.0)
        if last:
            tl.store(counter_ptr + counter_at, 0)
        inside = inside & last
    grad = slot_pointer(table, slot, GRAD, tl.float32, ALIGN)
    if GRAD == GRAD_A:
        at = grad + column.to(tl.int64)[None, :] * width + feature[:, None]
    else:
        at = grad + feature.to(tl.int64)[:, None] * columns + column[None, :]
        if PROJECTED:
            served = column_projections(table, slot, column)[None, :]
            own = tl.load(row_projection + feature, mask=feature < width, other=0).to(tl.int64)[:, None] + 1
            inside = inside & ((served == 0) | (served == own))
    tl.store(at, tl.load(at, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit(do_not_specialize=["num_slots", "module_key", "feature_offset"])
def _factor_grad_kernel(
    z_ptr, z_stride, q_ptr, q_stride, partial_ptr, counter_ptr, table, chunks, keys, row_projection,
    width, num_slots, module_key, feature_offset,
    GRAD: tl.constexpr, DROP: tl.constexpr, PROJECTED: tl.constexpr, EVEN: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, RB: tl.constexpr, ALIGN: tl.constexpr, OVERLAP: tl.constexpr,
    BESIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of rows by one strip of BN features by one block of RB columns."""
    await_predecessor(OVERLAP, BESIDE)
    strip, chunk, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = chunks + chunk * CHUNK_FIELDS
    slot, start, stop = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    part, parts = tl.load(entry + 3), tl.load(entry + 4)
    columns = slot_columns(table, slot, num_slots, ALIGN)
    if block * RB >= columns:
        outlast_predecessor(BESIDE)
        return
    feature = strip * BN + tl.arange(0, BN)
    column = block * RB + tl.arange(0, RB)
    real = column < columns
    if DROP:
        bound = tl.load(table + slot.to(tl.int64) * FIELDS + THRESHOLD).to(tl.uint32)
        thresholds = tl.zeros((BT,), tl.uint32) + bound
    acc = tl.zeros((BN, RB), tl.float32)
    for first in tl.range(start, stop, BT):
        rows = first + tl.arange(0, BT)
        valid = rows < stop
        z_mask = valid[:, None] if EVEN else valid[:, None] & (feature < width)[None, :]
        z = tl.load(z_ptr + rows.to(tl.int64)[:, None] * z_stride + feature[None, :], mask=z_mask, other=0.0)
        q_at = q_ptr + rows.to(tl.int64)[:, None] * q_stride + column[None, :]
        q = tl.load(q_at, mask=valid[:, None] & real[None, :], other=0.0)
        if DROP:
            key0, key1 = load_keys(keys, rows, valid)
            signs = keep_signs(key0, key1, thresholds, module_key, feature_offset + strip * BN, BT, BN)
            z = keep_where(signs, z)
        acc = tl.dot(tl.trans(z), q, acc, input_precision=PRECISION)
    counter_at = ((chunk - part) * tl.num_programs(0) + strip) * tl.num_programs(2) + block
    add_gradient(
        acc, partial_ptr, counter_ptr, table, slot, chunk, part, parts, feature, column, width, columns, q_stride,
        counter_at, row_projection, GRAD, PROJECTED, BN, RB, ALIGN,
    )  # fmt: skip
    outlast_predecessor(BESIDE)


_launch = Launcher(_factor_grad_kernel)


def gradient_parts(
    z: torch.Tensor, q: torch.Tensor, table: torch.Tensor, chunks: torch.Tensor, *, split: bool
) -> torch.Tensor:
    """Room for the chunks' parts of the gradient, ``[chunks, features, width]`` in fp32.

    Args:
        z, q, table, chunks: as in `factor_grad`.
        split: whether any adapter's rows are cut into several chunks.
    """
    if not split:
        # Not read; of one type in both cases, or the kernel would be compiled for each.
        return table.view(torch.float32)
    return torch.empty(chunks.shape[0], z.shape[1], q.shape[1], dtype=torch.float32, device=z.device)


def factor_grad(
    z: torch.Tensor,
    q: torch.Tensor,
    table: torch.Tensor,
    chunks: torch.Tensor,
    keys: torch.Tensor,
    counters: torch.Tensor,
    parts: torch.Tensor,
    *,
    grad: int,
    row_projection: torch.Tensor | None,
    module_key: int,
    feature_offset: int,
    drop: bool,
    align: int,
    overlap: bool,
    beside: bool = False,
    block_n: int = 128,
    block_t: int = 64,
    num_stages: int = 4,
    num_warps: int = 4,
) -> None:
    """``G += drop(z)ᵀ q`` per adapter, added to its fp32 gradient in place.

    Args:
        z: ``[tokens, features]``: X for A's gradient, dY for B's.
        q: ``[tokens, width]``: dS or S, both scaled already.
        table: slot table.
        chunks: chunk table.
        keys: int32 ``[tokens, 2]``.
        counters: int32, zeros, at least chunks * strips * blocks; zeros again afterwards.
        parts: of `gradient_parts`.
        grad: `GRAD_A` (stored as ``[columns, features]``) or `GRAD_B` (``[features, columns]``).
        row_projection: int32 ``[features]``, for B's gradient of a fused linear.
        module_key, feature_offset, drop: as in `down.down`.
        align: of `tables.table_alignment`.
        overlap: of `overlap.await_predecessor`.
        beside: whether to run beside the kernel before this one, in the places that it leaves. That one must write
            nothing that this one reads, and let its successor begin only when what this one reads is done. So nothing
            else may be launched in between: counters and parts are made before it.

    Note: the product before it is persistent, and its programs work in step so that they share what they read through
    the L2. They are all in place before this kernel starts (the product lets it start, each program once), and it
    takes what the last wave leaves idle. On a stream of its own this kernel could be there first, and a program of the
    product waited until it was done, which doubled the product's time (docs/kernels.md).
    """
    features, width = z.shape[1], q.shape[1]
    rb = min(power_of_two(width), 64)
    bn, bt = (block_n, block_t) if z.element_size() == 2 else (block_n // 2, block_t // 2)
    _launch(
        (cdiv(features, bn), chunks.shape[0], cdiv(width, rb)),
        (
            z, z.stride(0), q, width, parts, counters, table, chunks, keys, row_projection,
            features, table.shape[0], module_key, feature_offset,
        ),
        GRAD=grad, DROP=drop, PROJECTED=row_projection is not None, EVEN=features % bn == 0,
        BT=bt, BN=bn, RB=rb, ALIGN=align, OVERLAP=overlap, BESIDE=overlap and beside, PRECISION="ieee",
        options=launch_options(overlap, num_warps=num_warps, num_stages=num_stages),
    )  # fmt: skip
