"""From the host's packed arrays to one microbatch on the device, with its routing and dropout keys."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from ..kernels.dropout import row_keys
from ..lora.routing import RoutedSegment, build_routing
from ..types import Segment
from .stream import DeviceBatch, RoutedPackedSeqParams


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


def device_batch(
    packed: PackedArrays, *, seeds: Mapping[int, int], slots: Mapping[int, int], tile: int, device: torch.device
) -> DeviceBatch:
    """Copy a microbatch to the device.

    Args:
        packed: rows in job order; each job's rows contiguous and padded to ``tile``.
        seeds: job -> seed of its dropout masks.
        slots: job -> slot of its adapter.
        tile: rows per tile of the LoRA backend.
        device: where the model is.
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

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    cu_seqlens = move(packed.cu_seqlens)
    return DeviceBatch(
        jobs=tuple(segment.job for segment in packed.segments),
        input_ids=move(packed.input_ids)[None],
        labels=move(packed.labels)[None],
        position_ids=move(packed.position_ids)[None],
        loss_weights=move(packed.loss_weights),
        packed=RoutedPackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=packed.max_seqlen,
            max_seqlen_kv=packed.max_seqlen,
            routing=build_routing(
                [RoutedSegment(slot=slots[s.job], start=s.start, stop=s.stop) for s in packed.segments],
                num_tokens=tokens,
                tile=tile,
                row_keys=keys.to(device, non_blocking=True),
            ),
        ),
    )
