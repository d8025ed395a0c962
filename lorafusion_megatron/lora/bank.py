"""All adapters of one stage: each adapter's parameters, fp32 gradients and fp32 masters lie in one flat buffer each.

Features: an optimizer step is a few kernels and one all-reduce however many layers there are; gradients of what
every tensor-parallel rank holds alike lie together in front, so that their reduction is one contiguous piece.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..types import AdapterSpec
from .adapters import ALL_ROWS, LinearAdapter
from .layout import FactorPlace, TargetLinear, factor_places

ALIGNMENT = 64
"""Elements to which each factor's start is aligned: 128 bytes in bf16, enough for any bulk copy."""


class AdapterShard:
    """One adapter on this rank: flat buffers, and the views of them that its linears use.

    Attributes:
        master: fp32 ``[numel]``, what the optimizer steps.
        params: compute dtype ``[numel]``, what the linears read; the master itself in fp32.
        grad: fp32 ``[numel + 1]``; the last element collects the step's loss, so that it is reduced with it.
        num_replicated: how many elements in front every tensor-parallel rank holds alike.
        places: where this rank's part of every factor lies in them.
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
        self.places: list[FactorPlace] = []
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
        for place in self.places:
            place.take(into, factors[place.key])
        if flat is None:
            self.refresh()

    def factor_keys(self) -> list[tuple[int, str]]:
        """(layer, projection) of every factor pair on this rank."""
        return [(place.layer, place.projection) for place in self.places if place.factor == "A"]

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
        self.places += factor_places(target, projections, self.spec.rank, a_at, b_at)

    @torch.no_grad()
    def _init_values(self) -> None:
        """PEFT's start: A uniform in +-1/sqrt(in), B zero; from the whole matrix, so the same under any TP."""
        for place in self.places:
            if place.factor == "A":
                bound = 1.0 / math.sqrt(place.full_shape[1])
                generator = torch.Generator().manual_seed(_seed(self.spec.seed, f"{place.layer}.{place.projection}"))
                place.take(self.master, torch.empty(place.full_shape).uniform_(-bound, bound, generator=generator))
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


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
