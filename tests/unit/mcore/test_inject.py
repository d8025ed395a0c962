"""Which MLPs are taken over as a whole, and which are refused."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from lorafusion_megatron.lora.layout import LinearLayout
from lorafusion_megatron.lora.reference import TorchBackend
from lorafusion_megatron.mcore.inject import (
    LoraColumnParallelLinear,
    LoraRowParallelLinear,
    LoraSwigluMlp,
    _is_plain_swiglu,
    inject,
)

SWIGLU = {
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "use_te_activation_func": False,
}


class Gated(MLP):
    """As Megatron's shared expert: its forward does more than the MLP's."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states)[0] * 0.5


class Renamed(MLP):
    """A subclass with the MLP's own forward."""


class TakenOver(LoraColumnParallelLinear, torch.nn.Module):
    """A linear after `inject`."""


class TakenOverToo(LoraRowParallelLinear, torch.nn.Module):
    """The same of the other kind."""


def mlp(kind: type = MLP, *, bias: torch.Tensor | None = None, taken: bool = True, **changes) -> MLP:
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    made.config = SimpleNamespace(**(SWIGLU | changes))
    made.linear_fc1 = TakenOver()
    made.linear_fc2 = TakenOverToo() if taken else torch.nn.Linear(1, 1)
    made.linear_fc1.bias = bias
    return made


@pytest.mark.parametrize("kind", [MLP, Renamed])
def test_plain_swiglu_is_taken_over(kind):
    assert _is_plain_swiglu(mlp(kind))


@pytest.mark.parametrize(
    "other",
    [
        {"kind": Gated},
        {"bias": torch.ones(4)},
        {"taken": False},
        {"gated_linear_unit": False},
        {"activation_func": torch.nn.functional.gelu},
        {"activation_func_clamp_value": 7.0},
        {"glu_linear_offset": 1.0},
        {"use_te_activation_func": True},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_does_anything_else_keeps_its_own_forward(other):
    assert not _is_plain_swiglu(mlp(**other))


class OfOperations(MLP):
    """As Transformer Engine's fused MLP: its forward reads the linears' weights and calls none of them."""

    def _make_fused_impl(self):
        raise NotImplementedError


class Block(torch.nn.Module, BaseTransformerLayer):
    """A block of an MLP alone."""

    layer_number = 1


def layout(name: str, rows: int) -> LinearLayout:
    return LinearLayout(
        projections=(name,),
        projection_rows=(rows,),
        row_projection=torch.zeros(rows, dtype=torch.int32),
        row_index=torch.arange(rows),
    )


LAYOUTS = {"linear_fc1": layout("gate_up_proj", 8), "linear_fc2": layout("down_proj", 4)}


def block(kind: type) -> Block:
    """A block whose MLP has 4 features between 4 inputs and outputs."""
    made = Block()
    made.mlp = mlp(kind)
    for name, linear, shape in (
        ("linear_fc1", ColumnParallelLinear, (8, 4)),
        ("linear_fc2", RowParallelLinear, (4, 4)),
    ):
        module = linear.__new__(linear)
        torch.nn.Module.__init__(module)
        module.weight = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
        module.bias = None
        setattr(made.mlp, name, module)
    return made


def take_over(chunk: torch.nn.Module, layouts: dict[str, LinearLayout] = LAYOUTS) -> list:
    return inject([chunk], layouts, backend=TorchBackend(), tp_rank=0, tp_size=1)


def test_taking_over_twice_leaves_one_class_of_each():
    made = torch.nn.ModuleList([block(MLP)])
    assert [target.linear for target in take_over(made)] == ["linear_fc1", "linear_fc2"]
    kinds = [type(module) for module in made.modules()]
    take_over(made)
    assert [type(module) for module in made.modules()] == kinds
    assert isinstance(made[0].mlp, LoraSwigluMlp)


def test_an_mlp_that_never_calls_its_linears_is_refused_where_they_have_adapters():
    take_over(torch.nn.ModuleList([block(OfOperations)]), {})
    with pytest.raises(ValueError, match="use_transformer_engine_op_fuser=False"):
        take_over(torch.nn.ModuleList([block(OfOperations)]))


@pytest.mark.parametrize("name", ["linear_fc1", "linear_fc2"])
def test_a_linear_that_is_asked_for_more_than_its_own_product_says_so(name):
    made = torch.nn.ModuleList([block(MLP)])
    take_over(made)
    linear = getattr(made[0].mlp, name)
    with pytest.raises(NotImplementedError, match=rf"{name} .*not weight"):
        linear(torch.zeros(2, 4), weight=torch.zeros(8, 4))
    with pytest.raises(NotImplementedError, match="not 'bool'"):
        linear(torch.zeros(2, 4), True)
    linear._refuse((None,), {"runtime_gather_output": None, "is_first_microbatch": False})  # these ask for nothing
