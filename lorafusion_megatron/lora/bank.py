"""All adapters of one stage: each adapter's parameters, fp32 gradients and fp32 masters lie in one flat buffer each.

Features: an optimizer step is a few kernels and one all-reduce however many layers there are; gradients of what
every tensor-parallel rank holds alike lie together in front, so that their reduction is one contiguous piece.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..types import AdapterSpec
from .adapters import ALL_ROWS, LinearAdapter, LinearAdapters

ALIGNMENT = 64
"""Elements to which each factor's start is aligned: 128 bytes in bf16, enough for any bulk copy."""


@dataclass(frozen=True, kw_only=True)
class LinearLayout:
    """How Hugging Face's projections lie in the output rows that a rank holds of one Megatron linear."""

    projections: tuple[str, ...]
    """Hugging Face names, by index."""
    projection_rows: tuple[int, ...]
    """Output rows of each whole projection."""
    row_projection: torch.Tensor
    """int32 ``[out_features]``: the projection of each local output row."""
    row_index: torch.Tensor
    """int64 ``[out_features]``: the row of each local output row within its whole projection."""


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

    @property
    def device(self) -> torch.device:
        """Where the linear is."""
        return self.layout.row_index.device


@dataclass(frozen=True, kw_only=True)
class FactorPiece:
    """This rank's part of one factor of one projection, in PEFT's orientation, for exchange with files.

    ``full.index_copy_(dim, index, tensor)`` puts it in place; ``index`` None means that it is the whole.
    """

    layer: int
    projection: str
    factor: str
    """``A`` ``[r, in]`` or ``B`` ``[out, r]``."""
    full_shape: tuple[int, int]
    dim: int
    index: torch.Tensor | None
    tensor: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Where one projection's factors lie in the flat buffers."""

    target: TargetLinear
    projection: int
    name: str
    rows: torch.Tensor
    """int64: local output rows of the projection."""
    columns: slice
    """The projection's columns of B, and rows of A."""
    a_at: int
    """Where the linear's A starts in the flat buffer."""
    b_at: int
    b_shape: tuple[int, int]

    def a(self, flat: torch.Tensor) -> torch.Tensor:
        """View ``[r, in_features]`` of the projection's A in a flat buffer."""
        width = self.target.adapters.in_features
        return flat[self.a_at + self.columns.start * width : self.a_at + self.columns.stop * width].view(-1, width)

    def b(self, flat: torch.Tensor) -> torch.Tensor:
        """View ``[out_features, columns]`` of the linear's whole B in a flat buffer."""
        return flat[self.b_at : self.b_at + math.prod(self.b_shape)].view(self.b_shape)


class AdapterShard:
    """One adapter on this rank: flat buffers, and the views of them that its linears use.

    Attributes:
        master: fp32 ``[numel]``, what the optimizer steps.
        params: compute dtype ``[numel]``, what the linears read; the master itself in fp32.
        grad: fp32 ``[numel + 1]``; the last element collects the step's loss, so that it is reduced with it.
        num_replicated: how many elements in front every tensor-parallel rank holds alike.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        targets: Sequence[TargetLinear],
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self.spec = spec
        chosen = [(target, _projections_of(spec, target)) for target in targets]
        chosen = [(target, projections) for target, projections in chosen if projections]
        offsets, self.num_replicated, numel = _layout(spec.rank, chosen)
        if device is None:  # a stage without any linear has to be told
            device = targets[0].device if targets else torch.device("cpu")
        self.master = torch.zeros(numel, dtype=torch.float32, device=device)
        self.params = self.master if dtype == torch.float32 else torch.zeros(numel, dtype=dtype, device=device)
        self.grad = torch.zeros(numel + 1, dtype=torch.float32, device=device)
        self._blocks: list[_Block] = []
        self._linears: list[tuple[TargetLinear, LinearAdapter]] = []
        for (target, projections), (a_at, b_at) in zip(chosen, offsets, strict=True):
            self._place(target, projections, a_at, b_at)
        self._init_values()

    @property
    def numel(self) -> int:
        """Elements of this rank's share, alignment included."""
        return self.master.numel()

    @property
    def loss(self) -> torch.Tensor:
        """fp32 scalar view: the loss that microbatches of the current step add to (last stage)."""
        return self.grad[-1]

    def attach(self, slot: int, *, dropout: bool = True) -> None:
        """Serve rows of ``slot`` with this adapter on each of its linears; ``dropout`` False for validation."""
        for target, adapter in self._linears:
            target.adapters.by_slot[slot] = adapter if dropout else replace(adapter, dropout=0.0)

    def refresh(self) -> None:
        """Round the fp32 masters into the parameters that the linears read."""
        if self.params is not self.master:
            self.params.copy_(self.master)

    def pieces(self, flat: torch.Tensor) -> list[FactorPiece]:
        """This rank's part of every factor in a flat buffer (the master, a moment, or a copy of one), on the host."""
        out = []
        for block in self._blocks:
            target, size = block.target, self.spec.rank
            columns = None
            if not target.column_parallel:
                offset = target.adapters.feature_offset
                columns = torch.arange(offset, offset + target.adapters.in_features)
            rows_full = _full_rows(target, block.projection)
            out.append(
                FactorPiece(
                    layer=target.layer,
                    projection=block.name,
                    factor="A",
                    full_shape=(size, target.full_in_features),
                    dim=1,
                    index=columns,
                    tensor=block.a(flat).to("cpu", copy=True),
                )
            )
            out.append(
                FactorPiece(
                    layer=target.layer,
                    projection=block.name,
                    factor="B",
                    full_shape=(rows_full, size),
                    dim=0,
                    index=_full_row_index(target, block),
                    tensor=block.b(flat)[block.rows, block.columns].to("cpu", copy=True),
                )
            )
        return out

    @torch.no_grad()
    def load(self, factors: Mapping[tuple[int, str, str], torch.Tensor], flat: torch.Tensor | None = None) -> None:
        """Take values from whole factors: ``(layer, projection, "A" | "B")`` -> tensor in PEFT's orientation.

        Args:
            factors: at least those of this rank.
            flat: buffer to fill (a moment); None: the master, and the parameters with it.

        Raises:
            KeyError: a factor of this rank is missing.
        """
        into = self.master if flat is None else flat
        for block in self._blocks:
            target = block.target
            a, b = factors[target.layer, block.name, "A"], factors[target.layer, block.name, "B"]
            offset = target.adapters.feature_offset
            block.a(into).copy_(a[:, offset : offset + target.adapters.in_features])
            block.b(into)[block.rows, block.columns] = b[_full_row_index(target, block).to(b.device)].to(into)
        if flat is None:
            self.refresh()

    def factor_keys(self) -> list[tuple[int, str]]:
        """(layer, projection) of every factor pair on this rank."""
        return [(block.target.layer, block.name) for block in self._blocks]

    def detach(self, slot: int) -> None:
        """Stop serving ``slot``."""
        for target, _ in self._linears:
            del target.adapters.by_slot[slot]

    def _place(self, target: TargetLinear, projections: tuple[int, ...], a_at: int, b_at: int) -> None:
        linear = target.adapters
        columns = self.spec.rank * len(projections)
        a_shape, b_shape = (columns, linear.in_features), (linear.out_features, columns)

        def view(flat: torch.Tensor, at: int, shape: tuple[int, int]) -> torch.Tensor:
            return flat[at : at + math.prod(shape)].view(shape)

        self._linears.append(
            (
                target,
                LinearAdapter(
                    a=view(self.params, a_at, a_shape),
                    b=view(self.params, b_at, b_shape),
                    grad_a=view(self.grad, a_at, a_shape),
                    grad_b=view(self.grad, b_at, b_shape),
                    scaling=self.spec.scaling,
                    dropout=self.spec.dropout,
                    projections=projections,
                    rank=self.spec.rank,
                ),
            )
        )
        for k, projection in enumerate(projections):
            block = slice(k * self.spec.rank, (k + 1) * self.spec.rank)
            rows = torch.arange(linear.out_features, device=self.master.device)
            if projection != ALL_ROWS:
                rows = rows[target.layout.row_projection == projection]
            name = target.linear if projection == ALL_ROWS else target.layout.projections[projection]
            self._blocks.append(
                _Block(
                    target=target,
                    projection=projection,
                    name=name,
                    rows=rows,
                    columns=block,
                    a_at=a_at,
                    b_at=b_at,
                    b_shape=b_shape,
                )
            )

    @torch.no_grad()
    def _init_values(self) -> None:
        """PEFT's start: A uniform in +-1/sqrt(in), B zero; from the whole matrix, so the same under any TP."""
        for block in self._blocks:
            target = block.target
            bound = 1.0 / math.sqrt(target.full_in_features)
            generator = torch.Generator().manual_seed(_seed(self.spec.seed, f"{target.layer}.{block.name}"))
            full = torch.empty(self.spec.rank, target.full_in_features).uniform_(-bound, bound, generator=generator)
            offset = target.adapters.feature_offset
            block.a(self.master).copy_(full[:, offset : offset + target.adapters.in_features])
        self.refresh()


def _projections_of(spec: AdapterSpec, target: TargetLinear) -> tuple[int, ...]:
    """Which blocks the adapter has on this linear; empty where it doesn't target it."""
    if spec.layers_to_transform is not None and target.layer not in spec.layers_to_transform:
        return ()
    if target.linear in spec.target_modules:
        return (ALL_ROWS,)
    return tuple(k for k, name in enumerate(target.layout.projections) if name in spec.target_modules)


def _layout(
    rank: int, chosen: Sequence[tuple[TargetLinear, tuple[int, ...]]]
) -> tuple[list[tuple[int, int]], int, int]:
    """Offsets of (A, B) of each linear with the replicated factors in front; their size; the total size."""
    offsets = [[0, 0] for _ in chosen]
    end = 0
    for replicated in (True, False):
        for place, (target, projections) in zip(offsets, chosen, strict=True):
            columns = rank * len(projections)
            sizes = (columns * target.adapters.in_features, columns * target.adapters.out_features)
            for which, size in enumerate(sizes):
                if (target.column_parallel == (which == 0)) == replicated:
                    place[which] = end
                    end += -(-size // ALIGNMENT) * ALIGNMENT
        if replicated:
            num_replicated = end
    return [(a, b) for a, b in offsets], num_replicated, end


def _full_rows(target: TargetLinear, projection: int) -> int:
    return sum(target.layout.projection_rows) if projection == ALL_ROWS else target.layout.projection_rows[projection]


def _full_row_index(target: TargetLinear, block: _Block) -> torch.Tensor:
    """Rows of the whole B, in the order of Hugging Face's projections, that this rank's rows are."""
    index = target.layout.row_index[block.rows]
    if block.projection == ALL_ROWS:
        starts = torch.tensor([0, *target.layout.projection_rows[:-1]]).cumsum(0).to(index)
        index = index + starts[target.layout.row_projection.long()]
    return index.cpu()


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
