"""What the kernels read about adapters and rows: one table of slots a linear, one table of row chunks a microbatch.

Every adapter is named by addresses in device memory, so that one launch serves any number of adapters of any rank:

    slot table    int64 [slots, FIELDS]  addresses of A, B and their gradients, columns, dropout threshold, scale, …
    tile slots    int32 [tiles]          the slot of each tile of rows, -1 for rows without an adapter
    chunk table   int32 [chunks, 5]      slot, first row, end row, part, parts: items of the passes that sum over rows

A slot that is missing from a microbatch, or from a linear, costs nothing: no program does work for it.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

FIELDS = tl.constexpr(16)
FACTOR_A = tl.constexpr(0)
FACTOR_B = tl.constexpr(1)
GRAD_A = tl.constexpr(2)
GRAD_B = tl.constexpr(3)
COLUMNS = tl.constexpr(4)
THRESHOLD = tl.constexpr(5)
SCALE = tl.constexpr(6)
RANK = tl.constexpr(7)
PROJECTIONS = tl.constexpr(8)

CHUNK_FIELDS = tl.constexpr(5)
MAX_PROJECTIONS = 8
"""Blocks of columns that one adapter may have on a linear: a byte each in the PROJECTIONS field."""


@dataclass(frozen=True, kw_only=True)
class SlotRow:
    """One adapter's row of the slot table."""

    a: torch.Tensor
    b: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor
    columns: int
    threshold: int
    """15-bit threshold of `dropout.threshold`; 0 keeps everything."""
    scale: float
    """Scaling times the dropout's keep scale: the one factor of S and of dS."""
    rank: int
    projections: tuple[int, ...]
    """Projection served by each block of ``rank`` columns, -1 for all rows."""


def slot_table(rows: dict[int, SlotRow], device: torch.device) -> torch.Tensor:
    """int64 ``[most slot + 1, FIELDS]`` on the device; slots without an adapter have 0 columns.

    Raises:
        ValueError: an adapter has more than `MAX_PROJECTIONS` blocks of columns.

    Note: holds addresses, not references: who builds it keeps the tensors alive.
    """
    most = max(len(row.projections) for row in rows.values())
    if most > MAX_PROJECTIONS:
        raise ValueError(f"an adapter has {most} blocks of columns on one linear; the kernels know {MAX_PROJECTIONS}")
    table = torch.zeros(max(rows) + 1, FIELDS.value, dtype=torch.int64)
    for slot, row in rows.items():
        packed = sum((projection + 1) << (8 * block) for block, projection in enumerate(row.projections))
        scale_bits = struct.unpack("<i", struct.pack("<f", row.scale))[0]
        pointers = [tensor.data_ptr() for tensor in (row.a, row.b, row.grad_a, row.grad_b)]
        entries = [*pointers, row.columns, row.threshold, scale_bits, row.rank, packed]
        table[slot, : len(entries)] = torch.tensor(entries, dtype=torch.int64)
    return table.to(device)


def chunk_table(segments: Sequence[tuple[int, int, int]], *, rows_per_chunk: int) -> torch.Tensor:
    """Cut segments into chunks of about equal size.

    Args:
        segments: (slot, start, stop) each.
        rows_per_chunk: most rows of a chunk; a multiple of the tile.

    Returns:
        int32 ``[chunks, 5]``, on the CPU: slot, start, stop, part, parts.
    """
    out = []
    for slot, start, stop in segments:
        parts = -(-(stop - start) // rows_per_chunk)
        for part in range(parts):
            first = start + part * rows_per_chunk
            out.append((slot, first, min(stop, first + rows_per_chunk), part, parts))
    return torch.tensor(out, dtype=torch.int32).reshape(-1, CHUNK_FIELDS.value)


def table_alignment(rows: dict[int, SlotRow]) -> int:
    """What kernels may assume of all slots: columns in eights and 16-byte addresses (8), the latter (1), none (0)."""
    tensors = [t for row in rows.values() for t in (row.a, row.b, row.grad_a, row.grad_b)]
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return 0
    return 1 if any(row.columns % 8 for row in rows.values()) else 8


@triton.jit
def slot_columns(table, slot, num_slots, ALIGN: tl.constexpr):
    """Columns of the adapter in a slot; 0 for rows without one and for slots this linear doesn't know."""
    known = (slot >= 0) & (slot < num_slots)
    columns = tl.load(table + slot.to(tl.int64) * FIELDS + COLUMNS, mask=known, other=0).to(tl.int32)
    if ALIGN == 8:
        columns = tl.multiple_of(columns, 8)
    return columns


@triton.jit
def slot_pointer(table, slot, FIELD: tl.constexpr, dtype: tl.constexpr, ALIGN: tl.constexpr):
    """Address in a field of a slot as a pointer."""
    pointer = tl.load(table + slot.to(tl.int64) * FIELDS + FIELD).to(tl.pointer_type(dtype))
    if ALIGN > 0:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def slot_scale(table, slot):
    """Scale of a slot, fp32."""
    bits = tl.load(table + slot.to(tl.int64) * FIELDS + SCALE).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def column_projections(table, slot, columns):
    """Projection + 1 of each of the given columns of a slot; 0 where a column serves every output row."""
    rank = tl.load(table + slot.to(tl.int64) * FIELDS + RANK)
    packed = tl.load(table + slot.to(tl.int64) * FIELDS + PROJECTIONS)
    return (packed >> ((columns // rank) * 8)) & 0xFF
