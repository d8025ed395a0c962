"""The autograd function of a whole SwiGLU MLP with adapters on both its linears."""

from typing import Any, Protocol

import torch

from .adapters import LinearAdapters
from .autograd import routed_rows
from .routing import Routing


class SwigluBackend(Protocol):
    """A backend that computes the MLP as one; see `triton_backend.TritonBackend` for the formulas."""

    def fuses_swiglu(self, fc1: LinearAdapters, fc2: LinearAdapters, routing: Routing) -> bool:
        """Whether an MLP of these linears and this microbatch can be computed as one function."""
        ...

    def swiglu_mlp_forward(
        self,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        fc1: LinearAdapters,
        fc2: LinearAdapters,
        routing: Routing,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output ``[tokens, hidden]``, then what backward needs: linear_fc1's output and both linears' S."""
        ...

    def swiglu_mlp_backward(
        self,
        d_out: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        scaled: tuple[torch.Tensor, torch.Tensor],
        weights: tuple[torch.Tensor, torch.Tensor],
        fc1: LinearAdapters,
        fc2: LinearAdapters,
        routing: Routing,
        *,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """dx ``[tokens, hidden]``, None unless needed; adds the adapters' gradients to their fp32 buffers."""
        ...


class SwigluMlpFunction(torch.autograd.Function):
    """Saves x, linear_fc1's output and both S; the activation is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        weight1: torch.Tensor,
        weight2: torch.Tensor,
        fc1: LinearAdapters,
        fc2: LinearAdapters,
        routing: Routing,
        backend: SwigluBackend,
    ) -> torch.Tensor:
        """The arguments are `swiglu_mlp`'s, with x ``[tokens, hidden]``; out ``[tokens, hidden]``."""
        out, y, s1, s2 = backend.swiglu_mlp_forward(x, (weight1, weight2), fc1, fc2, routing)
        ctx.save_for_backward(x, y, s1, s2, weight1, weight2)
        ctx.fc1, ctx.fc2, ctx.routing, ctx.backend = fc1, fc2, routing, backend
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, s1, s2, weight1, weight2 = ctx.saved_tensors
        dx = ctx.backend.swiglu_mlp_backward(
            d_out, x, y, (s1, s2), (weight1, weight2), ctx.fc1, ctx.fc2, ctx.routing, needs_dx=ctx.needs_input_grad[0]
        )
        return dx, *(None,) * 7


def swiglu_mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    fc1: LinearAdapters,
    fc2: LinearAdapters,
    routing: Routing,
    *,
    backend: SwigluBackend,
    anchor: torch.Tensor,
) -> torch.Tensor:
    """``LoRA_fc2(silu(gate) * up)`` with ``[gate | up] = LoRA_fc1(x)``; without biases.

    Args:
        x: ``[..., hidden]``; the leading dimensions flatten to the microbatch's rows.
        weight1: ``[2 * features, hidden]`` of linear_fc1, gate before up, frozen.
        weight2: ``[hidden, features]`` of linear_fc2, frozen.
        fc1, fc2: adapters of both linears.
        routing: of this microbatch; ``backend.fuses_swiglu`` must have accepted it.
        backend: what computes it.
        anchor: an empty tensor that requires a gradient.

    Returns:
        ``[..., hidden]`` in x's dtype. Local to this rank: tensor-parallel collectives are the caller's.

    Raises:
        ValueError: the rows of x are not the rows of the routing.
    """
    rows = routed_rows(x, fc1, routing)
    out = SwigluMlpFunction.apply(rows, anchor, weight1, weight2, fc1, fc2, routing, backend)
    return out.view(*x.shape[:-1], out.shape[-1])
