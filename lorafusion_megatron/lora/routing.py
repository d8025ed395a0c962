"""Which rows of a microbatch belong to which adapter, and the dropout key of each row.

Routing travels with the microbatch: the backward and the recompute of a microbatch read the routing object that its
forward was given, never one that a later microbatch left on a module.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class RoutedSegment:
    """Rows ``start`` to ``stop`` of the microbatch, which go through the adapter in ``slot``."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Routing of one microbatch.

    Segments ascend, don't overlap, begin and end at multiples of ``tile`` (the last may end at ``num_tokens``),
    and belong to distinct slots. Rows in no segment are plain: they see the frozen base alone.
    """

    num_tokens: int
    segments: tuple[RoutedSegment, ...]
    tile: int
    """Rows per tile; a tile never holds rows of two adapters."""
    row_keys: torch.Tensor
    """int32 ``[num_tokens, 2]`` on the device: `kernels.dropout.row_keys`."""
    tile_slots: torch.Tensor
    """int32 ``[ceil(num_tokens / tile)]`` on the device: the tile's slot, -1 for plain rows."""
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """Device tables that a backend derives from the segments; they live as long as the microbatch."""


def build_routing(segments: Sequence[RoutedSegment], *, num_tokens: int, tile: int, row_keys: torch.Tensor) -> Routing:
    """Check the segments against the rows and build the device tables.

    Args:
        segments: ascending, disjoint, on tile borders.
        num_tokens: rows of the microbatch.
        tile: rows per tile.
        row_keys: int32 ``[num_tokens, 2]``, on the device where the linears run.

    Raises:
        ValueError: segments reach past the rows, overlap, or cut a tile.
    """
    if row_keys.shape != (num_tokens, 2) or row_keys.dtype != torch.int32:
        raise ValueError(f"row_keys is {row_keys.dtype} {tuple(row_keys.shape)}; it must be int32 ({num_tokens}, 2)")
    slots = torch.full((-(-num_tokens // tile),), -1, dtype=torch.int32)
    end = 0
    for segment in segments:
        if not end <= segment.start < segment.stop <= num_tokens:
            raise ValueError(f"{segment} does not fit: rows so far end at {end}, the microbatch has {num_tokens}")
        if segment.start % tile or (segment.stop % tile and segment.stop != num_tokens):
            raise ValueError(f"{segment} cuts a tile of {tile} rows")
        slots[segment.start // tile : -(-segment.stop // tile)] = segment.slot
        end = segment.stop
    if len({segment.slot for segment in segments}) != len(segments):
        raise ValueError("two segments of one microbatch share a slot; rows of one adapter must be contiguous")
    return Routing(
        num_tokens=num_tokens,
        segments=tuple(segments),
        tile=tile,
        row_keys=row_keys,
        tile_slots=slots.to(row_keys.device, non_blocking=True),
    )


_scope: ContextVar[Routing | None] = ContextVar("lora_routing", default=None)


def current_routing() -> Routing | None:
    """The routing of the block whose forward is running in this thread; None outside of one."""
    return _scope.get()


@contextmanager
def routing_scope(routing: Routing | None) -> Iterator[None]:
    """Make ``routing`` current while a block's forward, first or recomputed, runs.

    Note: Megatron hands ``packed_seq_params`` to each block but only the activation to its linears. The scope
    bridges that one call and nothing longer: the autograd function takes the routing out of it in forward and
    keeps it for backward.
    """
    token = _scope.set(routing)
    try:
        yield
    finally:
        _scope.reset(token)
