"""From the host's packed arrays to one microbatch on the device, with its routing and dropout keys.

Everything of a microbatch lies in one host buffer, pinned where a GPU is to read it, and crosses in one copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from ..kernels.dropout import row_keys
from ..lora.routing import RoutedSegment, Routing, build_routing
from ..types import Segment
from .attention import RoutedPackedSeqParams
from .stream import DeviceBatch

ALIGNMENT = 64
"""Bytes to which each array's start is aligned in the buffer."""
SHORTEST = 256
"""Least length in tokens that attention is told of."""


class PackedArrays(Protocol):
    """A collated microbatch, as `data.collate` makes it: one entry a row unless said otherwise."""

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def loss_weights(self) -> np.ndarray: ...
    @property
    def position_ids(self) -> np.ndarray: ...
    @property
    def cu_seqlens(self) -> np.ndarray: ...
    @property
    def max_seqlen(self) -> int: ...
    @property
    def segments(self) -> Sequence[Segment]: ...
    @property
    def row_job(self) -> np.ndarray: ...
    @property
    def row_step(self) -> np.ndarray: ...
    @property
    def row_sample(self) -> np.ndarray: ...
    @property
    def row_position(self) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """One microbatch on the host, ready to be copied."""

    jobs: tuple[int, ...]
    buffer: torch.Tensor
    """uint8: all arrays one after the other."""
    places: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]
    """Array -> its first byte, type and shape."""
    routing: Routing
    """With its tables on the host."""
    borders: tuple[int, ...]
    longest: int
    """Length in tokens that attention is told of: at least that of the longest sequence."""

    def to(self, device: torch.device) -> tuple[DeviceBatch, torch.Tensor]:
        """Copy to the device without waiting; (the microbatch, the one buffer that its tensors are views of)."""
        buffer = self.buffer.to(device, non_blocking=True)

        def view(name: str) -> torch.Tensor:
            start, dtype, shape = self.places[name]
            count = int(np.prod(shape)) * dtype.itemsize
            return buffer[start : start + count].view(dtype).view(shape)

        positions, cu_seqlens = view("position_ids"), view("cu_seqlens")
        batch = DeviceBatch(
            jobs=self.jobs,
            input_ids=view("input_ids")[None],
            labels=view("labels")[None],
            position_ids=positions[None],
            loss_weights=view("loss_weights"),
            packed=RoutedPackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=self.longest,
                max_seqlen_kv=self.longest,
                pad_between_seqs=False,
                routing=replace(self.routing, row_keys=view("row_keys"), tile_slots=view("tile_slots"), derived={}),
                positions=positions,
                borders=self.borders,
            ),
        )
        return batch, buffer


def host_batch(
    packed: PackedArrays, *, seeds: Mapping[int, int], slots: Mapping[int, int], tile: int, pinned: bool
) -> HostBatch:
    """Lay a microbatch out in one buffer, with its dropout keys and routing tables.

    Args:
        packed: rows in job order; each job's rows contiguous and padded to ``tile``.
        seeds: job -> seed of its dropout masks.
        slots: job -> slot of its adapter.
        tile: rows per tile of the LoRA backend.
        pinned: whether the buffer is page-locked, so that a copy to a GPU can run by itself.
    """
    tokens = len(packed.input_ids)
    seed = torch.zeros(tokens, dtype=torch.int64)
    for segment in packed.segments:
        seed[segment.start : segment.stop] = seeds[segment.job]
    keys = row_keys(
        seed,
        torch.from_numpy(packed.row_step),
        torch.from_numpy(packed.row_sample),
        torch.from_numpy(packed.row_position),
    )
    routing = build_routing(
        [RoutedSegment(slot=slots[s.job], start=s.start, stop=s.stop) for s in packed.segments],
        num_tokens=tokens,
        tile=tile,
        row_keys=keys,
    )
    arrays = {
        "input_ids": torch.from_numpy(packed.input_ids),
        "labels": torch.from_numpy(packed.labels),
        "position_ids": torch.from_numpy(packed.position_ids),
        "loss_weights": torch.from_numpy(packed.loss_weights),
        "cu_seqlens": torch.from_numpy(packed.cu_seqlens),
        "row_keys": keys,
        "tile_slots": routing.tile_slots,
    }
    buffer, places = _pack(arrays, pinned)
    return HostBatch(
        jobs=tuple(segment.job for segment in packed.segments),
        buffer=buffer,
        places=places,
        routing=routing,
        borders=tuple(packed.cu_seqlens.tolist()),
        longest=length_bucket(packed.max_seqlen),
    )


def length_bucket(tokens: int) -> int:
    """The power of two from `SHORTEST` on that holds ``tokens``.

    Note: attention libraries build a plan for every new length, which takes 10 to 100 ms; a longer one than needed
        costs blocks that end at once.
    """
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


def _pack(
    arrays: Mapping[str, torch.Tensor], pinned: bool
) -> tuple[torch.Tensor, dict[str, tuple[int, torch.dtype, tuple[int, ...]]]]:
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
    end = 0
    for name, array in arrays.items():
        places[name] = (end, array.dtype, tuple(array.shape))
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    for name, array in arrays.items():
        start = places[name][0]
        buffer[start : start + array.nbytes] = array.contiguous().view(-1).view(torch.uint8)
    return buffer, places
