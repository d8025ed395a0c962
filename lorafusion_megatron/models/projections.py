"""The projections inside Megatron's fused linears, and which of their rows a rank holds; knows no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.families import Split, dimension, model_parameters
from lorafusion_megatron.types import ModelSpec

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Megatron's names of a layer's target linears, in the order in which a layer runs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One Hugging Face linear inside a Megatron linear."""

    name: str
    """``q_proj``"""
    path: str
    """``model.layers.{i}.self_attn.q_proj``; ``{i}`` is the global layer number."""
    in_features: int
    out_features: int
    """Output rows over all tensor-parallel ranks."""

    def tensor_name(self, layer: int, factor: str) -> str:
        """PEFT's key of ``lora_A`` (factor ``A``) or ``lora_B`` (factor ``B``) in a layer."""
        return f"base_model.model.{self.path.format(i=layer)}.lora_{factor}.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetLinear:
    """One of Megatron's target linears of a layer."""

    name: str
    """``linear_qkv``"""
    path: str
    """``decoder.layers.{i}.self_attention.linear_qkv``; ``{i}`` is the global layer number."""
    split: Split
    """ROWS for column-parallel linears, COLUMNS for row-parallel ones."""
    by_query_group: bool
    projections: tuple[Projection, ...]

    @property
    def in_features(self) -> int:
        """Input features over all tensor-parallel ranks."""
        return self.projections[0].in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What an adapter trains of one linear."""

    projections: tuple[int, ...]
    """Ascending indices into the linear's projections."""
    shared: bool
    """Whether all of them share one A (targets under Megatron's names)."""


def target_linears(spec: ModelSpec) -> dict[str, TargetLinear]:
    """The target linears of a layer by Megatron's name, in the order of `LINEARS`."""
    found: dict[str, TargetLinear] = {}
    for parameter in model_parameters(spec):
        path, _, kind = parameter.name.rpartition(".")
        name = path.rpartition(".")[2]
        if kind == "weight" and name in LINEARS:
            projections = []
            for source in parameter.sources:
                module = source.name.removesuffix(".weight")
                rows, columns = (dimension(spec, word) for word in source.shape)
                projections.append(
                    Projection(name=module.rpartition(".")[2], path=module, in_features=columns, out_features=rows)
                )
            found[name] = TargetLinear(
                name=name,
                path=path,
                split=parameter.split,
                by_query_group=parameter.by_query_group,
                projections=tuple(projections),
            )
    return {name: found[name] for name in LINEARS}


def resolve_targets(
    spec: ModelSpec, target_modules: Sequence[str], *, key: str = "peft.target_modules"
) -> dict[str, Target]:
    """Which projections of which linears the names of a run file mean.

    Args:
        spec: dimensions of the model.
        target_modules: Hugging Face projection names and Megatron linear names.
        key: where the names were given, for messages.

    Returns:
        Megatron's linear name -> what is trained of it, in the order of `LINEARS`; linears without a target are
        left out.

    Raises:
        UserError: there is no name, a name matches nothing, or two names mean the same projection.
    """
    linears = target_linears(spec)
    places = {
        projection.name: (linear.name, index)
        for linear in linears.values()
        for index, projection in enumerate(linear.projections)
    }
    if not target_modules:
        raise _target_error("no target module", "an adapter needs at least one", places, key)
    owner: dict[tuple[str, int], str] = {}
    for target in target_modules:
        if target in linears:
            meant = [(target, index) for index in range(len(linears[target].projections))]
        elif target in places:
            meant = [places[target]]
        else:
            raise _target_error(f"{target!r} matches no linear of a layer", "a target must match", places, key)
        for place in meant:
            if place in owner:
                given = f"{target!r} and {owner[place]!r} mean the same weights"
                raise _target_error(given, "each projection is named once", places, key)
            owner[place] = target
    out: dict[str, Target] = {}
    for name in LINEARS:
        indices = tuple(sorted(index for linear, index in owner if linear == name))
        if indices:
            out[name] = Target(projections=indices, shared=owner[name, indices[0]] == name)
    return out


def projection_names(spec: ModelSpec, target_modules: Sequence[str], *, key: str = "peft.target_modules") -> list[str]:
    """The Hugging Face projections that targets mean, for ``target_modules`` of a PEFT configuration.

    Raises:
        UserError: as `resolve_targets`.
    """
    linears = target_linears(spec)
    return [
        linears[name].projections[index].name
        for name, target in resolve_targets(spec, target_modules, key=key).items()
        for index in target.projections
    ]


def adapter_shapes(
    spec: ModelSpec,
    target_modules: Sequence[str],
    rank: int,
    *,
    layers: Iterable[int] | None = None,
    key: str = "peft.target_modules",
) -> dict[str, tuple[int, int]]:
    """PEFT's keys of an adapter on ``layers`` (None: all) with their shapes: A ``[rank, in]``, B ``[out, rank]``.

    Raises:
        UserError: as `resolve_targets`.
    """
    linears, targets = target_linears(spec), resolve_targets(spec, target_modules, key=key)
    out: dict[str, tuple[int, int]] = {}
    for layer in range(spec.num_layers) if layers is None else layers:
        for name, target in targets.items():
            for index in target.projections:
                projection = linears[name].projections[index]
                out[projection.tensor_name(layer, "A")] = (rank, projection.in_features)
                out[projection.tensor_name(layer, "B")] = (projection.out_features, rank)
    return out


def row_projection(spec: ModelSpec, linear: str, tp_rank: int, tp_size: int) -> npt.NDArray[np.int32]:
    """The projection of each output row that a rank holds of a linear.

    Args:
        spec: dimensions of the model.
        linear: Megatron's name.
        tp_rank: this rank's place among the tensor-parallel ranks.
        tp_size: number of tensor-parallel ranks; divides the query groups and MLP features.

    Returns:
        int32 ``[local_rows]``: index into the linear's projections.
    """
    return _local_rows(spec, linear, tp_rank, tp_size)[0]


def row_of_projection(spec: ModelSpec, linear: str, tp_rank: int, tp_size: int) -> npt.NDArray[np.int32]:
    """The row within its projection's whole output of each output row that a rank holds of a linear.

    With `row_projection` it moves B between the two layouts:
    ``B_local[row] = B_hf[row_projection[row]][row_of_projection[row]]``.

    Returns:
        int32 ``[local_rows]``.
    """
    return _local_rows(spec, linear, tp_rank, tp_size)[1]


def input_features(spec: ModelSpec, linear: str, tp_rank: int, tp_size: int) -> slice:
    """The input features that a rank holds of a linear: a share of a row-parallel one, else all."""
    target = target_linears(spec)[linear]
    if target.split is not Split.COLUMNS:
        return slice(0, target.in_features)
    share = target.in_features // tp_size
    return slice(tp_rank * share, (tp_rank + 1) * share)


def _local_rows(
    spec: ModelSpec, linear: str, tp_rank: int, tp_size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    target = target_linears(spec)[linear]
    parts, index = (tp_size, tp_rank) if target.split is Split.ROWS else (1, 0)
    blocks = spec.num_query_groups // parts if target.by_query_group else 1
    owners, rows = [], []
    for number, projection in enumerate(target.projections):
        share = projection.out_features // parts
        local = np.arange(index * share, (index + 1) * share, dtype=np.int32).reshape(blocks, -1)
        rows.append(local)
        owners.append(np.full_like(local, number))
    return np.concatenate(owners, axis=1).ravel(), np.concatenate(rows, axis=1).ravel()


def _target_error(given: str, rule: str, places: Mapping[str, tuple[str, int]], key: str) -> UserError:
    remedy = f"choose from {', '.join(places)}, or from {', '.join(LINEARS)}"
    return UserError(given, rule=rule, remedy=remedy, key=key)
