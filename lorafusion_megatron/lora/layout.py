"""Where projections lie in the linears of a rank, and an adapter's factors in its flat buffers and in files."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from .adapters import ALL_ROWS, LinearAdapters

Run = tuple[int, int, int]
"""(row of a rank's matrix, row of the whole factor, number of rows)."""


@dataclass(frozen=True, kw_only=True)
class LinearLayout:
    """How Hugging Face's projections lie in the output rows that a rank holds of one Megatron linear; on the host."""

    projections: tuple[str, ...]
    """Hugging Face names, by index."""
    projection_rows: tuple[int, ...]
    """Output rows of each whole projection."""
    row_projection: torch.Tensor
    """int32 ``[out_features]``: the projection of each local output row."""
    row_index: torch.Tensor
    """int64 ``[out_features]``: the row of each local output row within its whole projection."""

    @cached_property
    def runs(self) -> dict[int, tuple[Run, ...]]:
        """Projection -> its local rows as runs of neighbours; `ALL_ROWS`: all, in the order of the projections."""
        of_row, index = self.row_projection.long(), self.row_index.long()
        starts = torch.tensor([0, *self.projection_rows[:-1]]).cumsum(0)
        runs = {ALL_ROWS: _runs(torch.arange(len(index)), index + starts[of_row])}
        for projection in range(len(self.projections)):
            rows = (of_row == projection).nonzero()[:, 0]
            runs[projection] = _runs(rows, index[rows])
        return runs


@dataclass(frozen=True, kw_only=True)
class TargetLinear:
    """One linear of this stage that adapters may target, and how tensor parallelism splits it."""

    adapters: LinearAdapters
    layer: int
    """Global layer number from 0."""
    linear: str
    """Megatron's name: linear_qkv, linear_proj, linear_fc1 or linear_fc2."""
    column_parallel: bool
    """Column-parallel: A is replicated and B split by rows. Otherwise A is split by columns and B replicated."""
    full_in_features: int
    layout: LinearLayout
    device: torch.device
    """Where the linear is."""


@dataclass(frozen=True, kw_only=True)
class FactorPlace:
    """Where one factor of one projection lies in a rank's flat buffers, and in the whole factor, in PEFT's orientation.

    A flat buffer holds it as ``width`` columns of a matrix; for each (row, full_row, n) of ``runs``

        whole[full_row : full_row + n, full_column : full_column + width] =
            matrix[row : row + n, column : column + width]
    """

    layer: int
    projection: str
    """Hugging Face's name, or Megatron's where one A is shared over a fused linear."""
    factor: str
    """``A`` ``[r, in]`` or ``B`` ``[out, r]``."""
    full_shape: tuple[int, int]
    at: int
    """Where the matrix starts in a flat buffer."""
    shape: tuple[int, int]
    """Of the matrix: all projections' A below each other ``[columns, in]``, or their B ``[out, columns]``."""
    column: int
    full_column: int
    width: int
    runs: tuple[Run, ...]

    @property
    def key(self) -> tuple[int, str, str]:
        """(layer, projection, ``A`` | ``B``)."""
        return self.layer, self.projection, self.factor

    def put(self, flat: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy this rank's part of the factor from a flat buffer into the whole."""
        for own, full in self._views(flat, whole):
            full.copy_(own)

    def take(self, flat: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy this rank's part of the factor from the whole into a flat buffer."""
        for own, full in self._views(flat, whole):
            own.copy_(full)

    def mark(self, covered: torch.Tensor) -> None:
        """Set what `put` writes in a bool tensor over the dimension that tensor parallelism splits."""
        if self.factor == "A":
            covered[self.full_column : self.full_column + self.width] = True
        else:
            for _, full_row, count in self.runs:
                covered[full_row : full_row + count] = True

    def _views(self, flat: torch.Tensor, whole: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        matrix = flat[self.at : self.at + math.prod(self.shape)].view(self.shape)
        own, full = matrix.narrow(1, self.column, self.width), whole.narrow(1, self.full_column, self.width)
        return [(own.narrow(0, row, n), full.narrow(0, full_row, n)) for row, full_row, n in self.runs]


def factor_places(
    target: TargetLinear, projections: tuple[int, ...], rank: int, a_at: int, b_at: int
) -> list[FactorPlace]:
    """The places of an adapter's factors on one linear, A before B, by projection.

    Args:
        target: the linear.
        projections: those that the adapter has there.
        rank: of the adapter.
        a_at, b_at: where the linear's A ``[columns, in]`` and B ``[out, columns]`` start in the flat buffers.
    """
    linear, layout, columns = target.adapters, target.layout, rank * len(projections)
    places = []
    for k, projection in enumerate(projections):
        whole = projection == ALL_ROWS
        name = target.linear if whole else layout.projections[projection]
        rows = sum(layout.projection_rows) if whole else layout.projection_rows[projection]
        a = FactorPlace(
            layer=target.layer,
            projection=name,
            factor="A",
            full_shape=(rank, target.full_in_features),
            at=a_at,
            shape=(columns, linear.in_features),
            column=0,
            full_column=linear.feature_offset,
            width=linear.in_features,
            runs=((k * rank, 0, rank),),
        )
        b = FactorPlace(
            layer=target.layer,
            projection=name,
            factor="B",
            full_shape=(rows, rank),
            at=b_at,
            shape=(linear.out_features, columns),
            column=k * rank,
            full_column=0,
            width=rank,
            runs=layout.runs[projection],
        )
        places += [a, b]
    return places


def _runs(rows: torch.Tensor, full_rows: torch.Tensor) -> tuple[Run, ...]:
    """Pairs of rows as runs in which both go on by one."""
    if not len(rows):
        return ()
    breaks = ((rows.diff() != 1) | (full_rows.diff() != 1)).nonzero()[:, 0] + 1
    starts = [0, *breaks.tolist()]
    stops = [*starts[1:], len(rows)]
    return tuple((int(rows[i]), int(full_rows[i]), stop - i) for i, stop in zip(starts, stops, strict=True))
