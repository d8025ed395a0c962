"""Takes the target linears of every transformer block over, by their type, wherever the block stands.

A module keeps its identity, parameters and name; its class becomes a subclass whose forward adds the adapters of
the microbatch's routing. Tensor-parallel collectives are the base layer's own: the adapters ride inside them.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from ..lora.adapters import LinearAdapters
from ..lora.autograd import Backend, lora_linear
from ..lora.layout import LinearLayout, TargetLinear
from ..lora.routing import current_routing, routing_scope
from ..lora.swiglu_mlp import swiglu_mlp


class RoutedBlock:
    """Transformer block whose linears see the routing that its ``packed_seq_params`` carries.

    Recompute calls the block again with the same arguments, so the linears then see the same routing.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with routing_scope(getattr(kwargs.get("packed_seq_params"), "routing", None)):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _LoraLinear:
    """What the column- and row-parallel take-overs share."""

    lora_adapters: LinearAdapters
    lora_backend: Backend
    lora_anchor: torch.Tensor

    def _fused(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        routing = current_routing()
        if routing is None:
            raise RuntimeError(
                f"{self.lora_adapters.name} ran without routing: pass packed_seq_params=RoutedPackedSeqParams(...) to "
                "the model, and recompute whole layers or core attention only"
            )
        return lora_linear(
            x,
            self.weight,  # type: ignore[attr-defined]
            self.lora_adapters,
            routing,
            backend=self.lora_backend,
            anchor=self.lora_anchor,
            bias=bias,
        )

    def _refuse(self, rest: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Raise where the base layer's forward is asked for more than its own weight times the input."""
        asked = [*rest, *named.values()]
        if any(value is not None and value is not False for value in asked):
            given = ", ".join([repr(type(value).__name__) for value in rest] + list(named))
            raise NotImplementedError(f"{self.lora_adapters.name} with adapters takes its input alone, not {given}")

    def _bias(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(to be added here, to be returned to the caller)."""
        bias = getattr(self, "bias", None)
        if bias is None or bias.numel() == 0:
            return None, None
        returned = getattr(self, "skip_bias_add", getattr(self, "te_return_bias", False))
        return (None, bias) if returned else (bias, None)


class LoraColumnParallelLinear(_LoraLinear):
    """Output rows split over TP: A is replicated, B split with the rows.

    The gradient of the input's adapter path is partial on each rank, like the base's, and one collective sums both.
    """

    def forward(self, input_: torch.Tensor, *rest: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._refuse(rest, named)
        added, returned = self._bias()
        return self._fused(self.gathered(input_), added), returned

    def gathered(self, input_: torch.Tensor) -> torch.Tensor:
        """What this rank's rows of the weight are multiplied with."""
        group = self.tp_group  # type: ignore[attr-defined]
        if getattr(self, "layer_norm_weight", None) is not None:
            input_ = _norm(self, input_)
        if self.sequence_parallel:  # type: ignore[attr-defined]
            return gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=group)
        return copy_to_tensor_model_parallel_region(input_, group=group)


class LoraRowParallelLinear(_LoraLinear):
    """Input columns split over TP: A is split with them, B is replicated.

    Each rank adds ``scaling * B s_k`` with its own partial ``s_k``; the base layer's reduction sums them.
    """

    def forward(self, input_: torch.Tensor, *rest: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._refuse(rest, named)
        y = self.reduced(self._fused(input_, None))
        added, returned = self._bias()
        return (y if added is None else y + added), returned

    def reduced(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of what each has."""
        group = self.tp_group  # type: ignore[attr-defined]
        if self.sequence_parallel:  # type: ignore[attr-defined]
            return reduce_scatter_to_sequence_parallel_region(partial, group=group)
        return reduce_from_tensor_model_parallel_region(partial, group=group)


class LoraSwigluMlp:
    """SwiGLU MLP whose activation and adapters are computed together, where backend and microbatch allow it.

    Otherwise, also where only one of the linears has adapters, the base class runs: linear, activation, linear.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's MLP: hidden states ``[s, b, hidden]`` to (output, bias)."""
        fc1, fc2, routing = self.linear_fc1, self.linear_fc2, current_routing()  # type: ignore[attr-defined]
        if (
            routing is None
            or any(argument is not None for argument in (*args, *kwargs.values()))
            or not isinstance(fc1, LoraColumnParallelLinear)
            or not isinstance(fc2, LoraRowParallelLinear)
            or not hasattr(fc1.lora_backend, "fuses_swiglu")
            or not fc1.lora_backend.fuses_swiglu(fc1.lora_adapters, fc2.lora_adapters, routing)
        ):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        partial = swiglu_mlp(
            fc1.gathered(hidden_states), fc1.weight, fc2.weight, fc1.lora_adapters, fc2.lora_adapters, routing,
            backend=fc1.lora_backend, anchor=fc1.lora_anchor,
        )  # fmt: skip
        return fc2.reduced(partial), None


def inject(
    chunks: Iterable[torch.nn.Module],
    layouts: Mapping[str, LinearLayout],
    *,
    backend: Backend,
    tp_rank: int,
    tp_size: int,
    layer_of: Callable[[BaseTransformerLayer], int] | None = None,
) -> list[TargetLinear]:
    """Take over every block and its target linears; idempotent.

    Args:
        chunks: this rank's model chunks.
        layouts: Megatron's names of the linears to take over (those that some job targets), with how Hugging Face's
            projections lie in this rank's rows of each.
        backend: what computes them.
        tp_rank: place in the tensor-parallel group.
        tp_size: size of that group.
        layer_of: a block's layer in Hugging Face's numbering, from 0; None: Megatron's number less one.

    Returns:
        The taken-over linears of this stage, by layer and name.

    Raises:
        ValueError: a linear of a target's name is of a type that can't be taken over, or is not called by its MLP.
    """
    columns, rows = _linear_types()
    targets: list[TargetLinear] = []
    for chunk in chunks:
        for block in [m for m in chunk.modules() if isinstance(m, BaseTransformerLayer)]:
            _become(block, RoutedBlock)
            for name, module in list(block.named_modules()):
                linear = name.rsplit(".", 1)[-1]
                if linear not in layouts:
                    continue
                if not isinstance(module, columns + rows):
                    raise ValueError(f"{name} is a {type(module).__name__}, which can't be taken over")
                column = isinstance(module, columns)
                layer = block.layer_number - 1 if layer_of is None else layer_of(block)
                full_name = f"decoder.layers.{layer}.{name}"
                target = _target(module, full_name, layouts[linear], column, tp_rank, tp_size)
                _become(module, LoraColumnParallelLinear if column else LoraRowParallelLinear)
                module.lora_adapters = target.adapters
                module.lora_backend = backend
                module.lora_anchor = torch.empty(0, device=module.weight.device, requires_grad=True)
                targets.append(target)
            for mlp in [m for m in block.modules() if isinstance(m, MLP)]:
                _check_calls_linears(mlp)
                if _is_plain_swiglu(mlp):
                    _become(mlp, LoraSwigluMlp)
    return sorted(targets, key=lambda t: (t.layer, t.adapters.name))


def taken_over(chunks: Iterable[torch.nn.Module]) -> list[tuple[torch.nn.Module, type, type]]:
    """Every taken-over linear with the class it had before and the one it has now."""
    linears = [module for chunk in chunks for module in chunk.modules() if isinstance(module, _LoraLinear)]
    return [(module, type(module).__bases__[1], type(module)) for module in linears]


def _check_calls_linears(mlp: MLP) -> None:
    """Refuse Transformer Engine's fused MLP: it reads its linears' weights, and adapters on them would do nothing."""
    taken = any(isinstance(linear, _LoraLinear) for linear in (mlp.linear_fc1, mlp.linear_fc2))
    if taken and hasattr(mlp, "_make_fused_impl"):
        raise ValueError(
            f"{type(mlp).__name__} computes without calling its linears, so their adapters would have no effect: "
            "build the model with use_transformer_engine_op_fuser=False"
        )


def _is_plain_swiglu(mlp: MLP) -> bool:
    """Whether an MLP is ``fc2(silu(gate) * up)`` and nothing else, on linears that were taken over."""
    config, linears = mlp.config, (mlp.linear_fc1, mlp.linear_fc2)
    return (
        type(mlp).forward is MLP.forward  # a subclass that does more (a shared expert's gate) keeps its own
        and config.gated_linear_unit
        and config.activation_func is torch.nn.functional.silu
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0.0
        and not config.use_te_activation_func
        and all(isinstance(linear, _LoraLinear) and linear._bias() == (None, None) for linear in linears)
    )


def _linear_types() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Column- and row-parallel linear classes, Transformer Engine's among them where it is installed."""
    columns: tuple[type, ...] = (ColumnParallelLinear,)
    rows: tuple[type, ...] = (RowParallelLinear,)
    try:
        from megatron.core.extensions import transformer_engine as te
    except ImportError:
        return columns, rows
    if te.HAVE_TE:
        columns += (te.TEColumnParallelLinear, te.TELayerNormColumnParallelLinear)
        rows += (te.TERowParallelLinear,)
    return columns, rows


@cache
def _subclass(base: type, mixin: type) -> type:
    return type(f"{mixin.__name__}Of{base.__name__}", (mixin, base), {"__module__": __name__})


def _become(module: torch.nn.Module, mixin: type) -> None:
    if not isinstance(module, mixin):
        module.__class__ = _subclass(type(module), mixin)


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The norm that Transformer Engine fuses in front of a linear, from the module's own weights."""
    weight = module.layer_norm_weight
    if module.zero_centered_gamma:
        weight = weight + 1
    if module.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, module.eps)
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, module.layer_norm_bias, module.eps)


def _target(module: Any, name: str, layout: LinearLayout, column: bool, tp_rank: int, tp_size: int) -> TargetLinear:
    out_features, in_features = module.weight.shape
    device = module.weight.device
    return TargetLinear(
        adapters=LinearAdapters(
            name=name,
            module_key=zlib.crc32(name.encode()),
            in_features=in_features,
            out_features=out_features,
            feature_offset=0 if column else tp_rank * in_features,
            row_projection=layout.row_projection.to(device) if len(layout.projections) > 1 else None,
        ),
        layer=int(name.split(".")[2]),
        linear=name.rsplit(".", 1)[-1],
        column_parallel=column,
        full_in_features=in_features * (1 if column else tp_size),
        layout=layout,
        device=device,
    )
