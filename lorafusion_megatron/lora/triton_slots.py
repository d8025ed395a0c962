"""What the Triton backend knows of a linear's adapters and of a microbatch before it launches anything."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels import dropout, tables
from .adapters import LinearAdapter, LinearAdapters
from .routing import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """A linear's slot table, valid while its adapters are these very objects."""

    entries: dict[int, weakref.ref[LinearAdapter]]
    """Weak: an adapter that left must not stay in memory until its linear runs another one."""
    table: torch.Tensor
    align: int

    def serves(self, adapters: LinearAdapters) -> bool:
        """Whether no slot was attached, replaced or removed since."""
        now, entries = adapters.by_slot, self.entries
        return len(now) == len(entries) and all(
            slot in entries and entries[slot]() is adapter for slot, adapter in now.items()
        )


class Call(NamedTuple):
    """What one launch sequence needs to know of a slot table and a microbatch.

    Note: nothing of the linear itself. Linears may share a table and a routing (PEFT's, with a key for every call).
    """

    slots: Slots
    width: int
    """Columns of S: the widest adapter's in this microbatch, rounded up to 16."""
    drop: bool
    """Whether any of these adapters drops."""


def make_call(slots: Slots, active: Sequence[LinearAdapter], routing: Routing) -> Call:
    """What the adapters of a microbatch need; remembered with its routing while the slot table lives.

    Args:
        slots: of the linear.
        active: its adapters that have rows in the microbatch, at least one.
        routing: of the microbatch.
    """
    known = routing.derived.setdefault("calls", weakref.WeakKeyDictionary())
    needs = known.get(slots)
    if needs is None:
        width = -(-max(adapter.columns for adapter in active) // 16) * 16
        needs = known[slots] = width, any(adapter.dropout > 0.0 for adapter in active)
    return Call(slots, *needs)


def make_slots(adapters: LinearAdapters, device: torch.device) -> Slots:
    """The slot table of a linear as its adapters are now."""
    rows = {
        slot: tables.SlotRow(
            a=adapter.a,
            b=adapter.b,
            grad_a=adapter.grad_a,
            grad_b=adapter.grad_b,
            columns=adapter.columns,
            threshold=dropout.threshold(adapter.dropout),
            scale=adapter.scaling * dropout.keep_scale(adapter.dropout),
            rank=adapter.rank,
            projections=adapter.projections,
        )
        for slot, adapter in adapters.by_slot.items()
    }
    align = tables.table_alignment(rows)
    entries = {slot: weakref.ref(adapter) for slot, adapter in adapters.by_slot.items()}
    return Slots(entries=entries, table=tables.slot_table(rows, device), align=align)


def with_rows(z: torch.Tensor) -> torch.Tensor:
    """z with contiguous rows; copies only where they are not."""
    return z if z.stride(1) == 1 and z.stride(0) >= z.shape[1] else z.contiguous()


def with_gaps(segments: list[tuple[int, int, int]], tokens: int) -> list[tuple[int, int, int]]:
    """(slot, start, stop) of every row: the segments, and in slot -1 what lies between and behind them."""
    out, end = [], 0
    for slot, start, stop in [*segments, (-1, tokens, tokens)]:
        if start > end:
            out.append((-1, end, start))
        if stop > start:
            out.append((slot, start, stop))
        end = stop
    return out


def is_pure(routing: Routing, rows: int) -> bool:
    """Whether no block of ``rows`` rows holds two adapters."""
    return all(segment.start % rows == 0 for segment in routing.segments) and all(
        segment.stop % rows == 0 or segment.stop == routing.num_tokens for segment in routing.segments
    )


def signed(key: int) -> int:
    """32 bits as the signed number that a kernel takes."""
    return key - (1 << 32) if key >= 1 << 31 else key
