"""Which MLPs are taken over as a whole."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.mlp import MLP

from lorafusion_megatron.mcore.inject import LoraColumnParallelLinear, LoraRowParallelLinear, _is_plain_swiglu

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
