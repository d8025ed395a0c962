"""Whole adapters on rank 0 from the flat buffers of all stages and tensor ranks.

Features: nothing large is pickled: what an adapter's buffers hold crosses as it lies there, piece by piece. A GPU is
read on a stream of its own through pinned memory, so that training does not wait for the copy. An interpreter has one
lock: a thread that pickles stops the one that trains, and one that makes many small calls is stopped by it. What takes
time here is few calls that let go of the lock.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from ..lora.bank import AdapterShard
from ..lora.layout import FactorPlace
from .parallel import Groups

Factors = dict[tuple[int, str, str], torch.Tensor]
"""(layer, projection, "A" | "B") -> fp32 tensor in PEFT's orientation."""
type Gather = Callable[[torch.Tensor, torch.cuda.Event | None], Factors | None]
"""One of an adapter's flat buffers, and when it is written -> its factors on rank 0, None elsewhere; for all ranks."""

PIECE = 1 << 23
"""Elements that cross at once: 32 MiB of fp32, which a GPU hands over in 1 to 2 ms."""


class FactorGatherer:
    """Brings the state of adapters to rank 0; every rank uses it in the same order, from one thread.

    Args:
        groups: this rank's groups. Replicas hold the same values: the first one's are taken.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._stream, self._pinned = None, None
        if groups.device.type == "cuda":
            # Made once: to lock pages while a GPU works makes the host wait for it.
            self._stream = torch.cuda.Stream(groups.device)
            self._pinned = torch.empty(PIECE, dtype=torch.float32, pin_memory=True)

    def adapter(self, shard: AdapterShard) -> Gather:
        """What gathers this adapter's buffers, whose layout on all ranks is known then; every rank calls it."""
        places = list(shard.places) if self._groups.dp_rank == 0 else []
        everyone = self._groups.gather((places, shard.numel if places else 0), self._groups.saves)
        return partial(self._whole, everyone)

    def _whole(
        self, everyone: list[tuple[list[FactorPlace], int]] | None, flat: torch.Tensor, ready: torch.cuda.Event | None
    ) -> Factors | None:
        """All factors that lie in the ranks' ``flat``, on rank 0; None elsewhere.

        Args:
            everyone: by rank, the places of its factors and the elements of its buffer (rank 0).
            flat: fp32 ``[numel]`` of this rank; it may be let go of when this returns.
            ready: passed when ``flat`` is written; None on the CPU.
        """
        if everyone is None:
            if self._groups.dp_rank == 0:
                for piece in self._pieces(flat, ready):
                    dist.send(piece, dst=0, group=self._groups.saves)
            return None
        parts = [(everyone[0][0], self._on_host(flat, ready))]
        for rank, (places, numel) in enumerate(everyone[1:], 1):
            received = torch.empty(numel)
            for piece in _split(received):
                dist.recv(piece, src=rank, group=self._groups.saves)
            parts.append((places, received))
        return assemble(parts)

    def _on_host(self, flat: torch.Tensor, ready: torch.cuda.Event | None) -> torch.Tensor:
        if self._stream is None:
            return flat
        out = torch.empty(flat.numel())
        for into, piece in zip(_split(out), self._pieces(flat, ready), strict=True):
            into.copy_(piece)
        return out

    def _pieces(self, flat: torch.Tensor, ready: torch.cuda.Event | None) -> Iterator[torch.Tensor]:
        """A flat buffer piece by piece on the host; each is good until the next one is asked for."""
        if self._stream is None or self._pinned is None:
            yield from _split(flat)
            return
        if ready is not None:
            self._stream.wait_event(ready)
        for piece in _split(flat):
            pinned = self._pinned[: piece.numel()]
            with torch.cuda.stream(self._stream):
                pinned.copy_(piece, non_blocking=True)
            self._stream.synchronize()
            yield pinned


def _split(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of a buffer that cross one by one; none where it is empty, which `torch.split` makes one of."""
    return flat.split(PIECE) if flat.numel() else ()


def assemble(parts: Iterable[tuple[Iterable[FactorPlace], torch.Tensor]]) -> Factors:
    """Put the flat buffers of every rank of a replica together.

    Args:
        parts: of each rank, the places of its factors and its buffer, on the host.

    Raises:
        ValueError: some part of a factor came from no rank.
    """
    whole: Factors = {}
    covered: dict[tuple[int, str, str], torch.Tensor] = {}
    for places, flat in parts:
        for place in places:
            if place.key not in whole:
                whole[place.key] = torch.empty(place.full_shape)
                covered[place.key] = torch.zeros(place.full_shape[place.factor == "A"], dtype=torch.bool)
            place.put(flat, whole[place.key])
            place.mark(covered[place.key])
    for key, mask in covered.items():
        if not mask.all():
            raise ValueError(
                f"layer {key[0]} {key[1]} {key[2]}: {int((~mask).sum())} of {len(mask)} rows came from no rank"
            )
    return whole
