"""The adapters of one target linear on one rank, as the backends see them."""

from dataclasses import dataclass, field
from typing import Any

import torch

ALL_ROWS = -1
"""Projection index of a factor pair that serves every output row of its linear."""


@dataclass(frozen=True, kw_only=True)
class LinearAdapter:
    """One adapter's share of one target linear on this rank.

    A fused linear (``linear_qkv``, ``linear_fc1``) with per-projection adapters is one adapter of
    ``columns = projections * rank``: the A of the projections stand below each other, B is block-sparse (a row of
    q has non-zeros in the columns of q alone). Its off-block entries are zero and stay so: backends must leave
    the off-block entries of ``grad_b`` alone or add zeros to them.
    """

    a: torch.Tensor
    """``[columns, in_features]``, compute dtype, contiguous: a view of the adapter's flat buffer."""
    b: torch.Tensor
    """``[out_features, columns]``, compute dtype, contiguous."""
    grad_a: torch.Tensor
    """fp32 ``[columns, in_features]``: backward adds to it."""
    grad_b: torch.Tensor
    """fp32 ``[out_features, columns]``: backward adds to it."""
    scaling: float
    dropout: float
    projections: tuple[int, ...]
    """Per block of ``rank`` columns the projection (index into the linear's output projections) whose rows it
    serves; `ALL_ROWS` where one A is shared over the whole fused linear."""
    rank: int

    @property
    def columns(self) -> int:
        """Width of S for this adapter."""
        return self.rank * len(self.projections)

    def block_mask(self, row_projection: torch.Tensor | None) -> torch.Tensor | None:
        """bool ``[out_features, columns]``: the entries of B that exist; None where all do."""
        if row_projection is None or self.projections == (ALL_ROWS,):
            return None
        of_column = torch.tensor(self.projections, device=row_projection.device).repeat_interleave(self.rank)
        return (of_column == row_projection[:, None]) | (of_column == ALL_ROWS)


@dataclass(kw_only=True)
class LinearAdapters:
    """All adapters of one target linear on this rank, by slot."""

    name: str
    """Canonical name, with the global layer number: ``decoder.layers.3.mlp.linear_fc1``."""
    module_key: int
    """32 bits hashed from ``name``: the module's part of the dropout counter, the same on every topology."""
    in_features: int
    out_features: int
    feature_offset: int = 0
    """Global index of this rank's first input feature (row-parallel linears under TP), for the dropout counter."""
    row_projection: torch.Tensor | None = None
    """int32 ``[out_features]``: the projection of each output row of a fused linear; None where there is one."""
    by_slot: dict[int, LinearAdapter] = field(default_factory=dict)
    """Slot -> adapter; a slot without an entry has no adapter on this linear (its rows see the frozen base)."""
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What a backend derives from ``by_slot`` and keeps; it must notice a replaced entry."""
