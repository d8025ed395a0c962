"""Whole adapters on rank 0 from the shards of all stages and tensor ranks."""

from collections.abc import Iterable, Sequence

import torch

from ..lora.bank import FactorPiece
from .parallel import Groups

Factors = dict[tuple[int, str, str], torch.Tensor]
"""(layer, projection, "A" | "B") -> fp32 tensor in PEFT's orientation."""


def gather_factors(pieces: Sequence[FactorPiece], groups: Groups) -> Factors | None:
    """All factors of one adapter on rank 0, None elsewhere; every rank of the run calls it.

    Replicas hold the same values: the first one's are taken.
    """
    mine = list(pieces) if groups.dp_rank == 0 else []
    gathered = groups.gather(mine, groups.saves)
    return None if gathered is None else assemble(piece for part in gathered for piece in part)


def assemble(pieces: Iterable[FactorPiece]) -> Factors:
    """Put pieces of every rank of a replica together.

    Raises:
        ValueError: some part of a factor came from no rank.
    """
    whole: Factors = {}
    covered: dict[tuple[int, str, str], torch.Tensor] = {}
    for piece in pieces:
        key = (piece.layer, piece.projection, piece.factor)
        length = piece.full_shape[piece.dim]
        index = torch.arange(length) if piece.index is None else piece.index
        whole.setdefault(key, torch.empty(piece.full_shape)).index_copy_(piece.dim, index, piece.tensor)
        covered.setdefault(key, torch.zeros(length, dtype=torch.bool))[index] = True
    for key, mask in covered.items():
        if not mask.all():
            raise ValueError(
                f"layer {key[0]} {key[1]} {key[2]}: {int((~mask).sum())} of {len(mask)} rows came from no rank"
            )
    return whole
