"""Between the adapter shards of the ranks and PEFT's tensors."""

from collections.abc import Mapping

import torch

from ..mcore.gather import Factors
from ..models.projections import adapter_shapes, resolve_targets, target_linears
from ..types import AdapterSpec, ModelSpec


def to_peft(factors: Factors, model: ModelSpec) -> dict[str, torch.Tensor]:
    """PEFT's key -> tensor; one A shared over a fused linear appears under each of its projections."""
    linears = target_linears(model)
    by_projection = {p.name: p for linear in linears.values() for p in linear.projections}
    out: dict[str, torch.Tensor] = {}
    for (layer, name, factor), tensor in factors.items():
        if name in by_projection:
            out[by_projection[name].tensor_name(layer, factor)] = tensor
            continue
        start = 0
        for projection in linears[name].projections:
            stop = start + projection.out_features
            out[projection.tensor_name(layer, factor)] = tensor if factor == "A" else tensor[start:stop]
            start = stop
    return out


def from_peft(tensors: Mapping[str, torch.Tensor], spec: AdapterSpec, model: ModelSpec) -> Factors:
    """The factors that the bank loads, from PEFT's tensors of a checked adapter of the same targets."""
    linears = target_linears(model)
    layers = range(model.num_layers) if spec.layers_to_transform is None else spec.layers_to_transform
    out: Factors = {}
    for name, target in resolve_targets(model, spec.target_modules).items():
        projections = [linears[name].projections[index] for index in target.projections]
        for layer in layers:
            if target.shared:
                out[layer, name, "A"] = tensors[projections[0].tensor_name(layer, "A")]
                out[layer, name, "B"] = torch.cat([tensors[p.tensor_name(layer, "B")] for p in projections])
                continue
            for projection in projections:
                for factor in ("A", "B"):
                    out[layer, projection.name, factor] = tensors[projection.tensor_name(layer, factor)]
    return out


def factor_shapes(spec: AdapterSpec, model: ModelSpec) -> dict[tuple[int, str, str], tuple[int, ...]]:
    """Every whole factor that the bank holds of an adapter, ``(layer, projection, "A" | "B")``, with its shape."""
    shapes = adapter_shapes(model, spec.target_modules, spec.rank, layers=spec.layers_to_transform)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return {key: tuple(factor.shape) for key, factor in from_peft(tensors, spec, model).items()}
