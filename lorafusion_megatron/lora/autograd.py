"""The autograd function of a frozen linear with its adapters, split at S as the paper splits it."""

from typing import Any, Protocol

import torch

from .adapters import LinearAdapters
from .routing import Routing


class Backend(Protocol):
    """What computes a frozen linear with its adapters; see `reference.TorchBackend` for the formulas."""

    name: str
    tile: int
    """Rows per tile that the routing must use."""

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        adapters: LinearAdapters,
        routing: Routing,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y ``[tokens, out]`` and what `backward` needs as ``s``: drop(x) A^T of all rows, None where none has one."""
        ...

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        s: torch.Tensor | None,
        adapters: LinearAdapters,
        routing: Routing,
        *,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """dx ``[tokens, in]``, None unless needed; adds dA and dB to the adapters' fp32 ``grad_a`` and ``grad_b``."""
        ...

    def reason_unsupported(self, x: torch.Tensor, weight: torch.Tensor) -> str | None:
        """Why these can't be computed here; None where they can."""
        ...


class LoraLinearFunction(torch.autograd.Function):
    """Saves x, S and the routing; gradients of A and B go straight into the adapters' fp32 buffers.

    ``anchor`` is an empty tensor that requires a gradient: it makes the output require one where x does not (the
    first block over a frozen embedding), so that the adapters' gradients are not lost there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        adapters: LinearAdapters,
        routing: Routing,
        backend: Backend,
    ) -> torch.Tensor:
        """The arguments are `lora_linear`'s, with x ``[tokens, in]``; y ``[tokens, out]``."""
        y, s = backend.forward(x, weight, bias, adapters, routing)
        # Without an adapter on this linear nothing but the weight is needed.
        ctx.save_for_backward(None if s is None else x, weight, s)
        ctx.adapters, ctx.routing, ctx.backend = adapters, routing, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, s = ctx.saved_tensors
        dx = ctx.backend.backward(dy, x, weight, s, ctx.adapters, ctx.routing, needs_dx=ctx.needs_input_grad[0])
        return dx, None, None, None, None, None, None


def routed_rows(x: torch.Tensor, adapters: LinearAdapters, routing: Routing) -> torch.Tensor:
    """``x`` as ``[tokens, in]``.

    Raises:
        ValueError: its rows are not the rows of the routing.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] != routing.num_tokens:
        raise ValueError(
            f"{adapters.name} got {rows.shape[0]} rows but its routing covers {routing.num_tokens}; "
            "under sequence parallel the input must be gathered before the adapters"
        )
    return rows


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: LinearAdapters,
    routing: Routing,
    *,
    backend: Backend,
    anchor: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y = x Wᵀ + bias + scaling * B (A drop(x))`` with each row's own adapter.

    Args:
        x: ``[..., in]``; the leading dimensions flatten to the microbatch's rows.
        weight: ``[out, in]``, frozen.
        adapters: this linear's adapters by slot.
        routing: of this microbatch.
        backend: what computes it.
        anchor: an empty tensor that requires a gradient.
        bias: ``[out]``, frozen.

    Returns:
        ``[..., out]`` in x's dtype. Local to this rank: tensor-parallel collectives are the caller's.

    Raises:
        ValueError: the rows of x are not the rows of the routing.
    """
    y = LoraLinearFunction.apply(routed_rows(x, adapters, routing), anchor, weight, bias, adapters, routing, backend)
    return y.view(*x.shape[:-1], y.shape[-1])
