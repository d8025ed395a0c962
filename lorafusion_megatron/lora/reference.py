"""The PyTorch backend: plain tensor operations per segment. Reference for the kernels, and what runs without a GPU."""

import torch
import torch.nn.functional as F

from ..kernels import dropout
from .adapters import LinearAdapter, LinearAdapters
from .routing import Routing


class TorchBackend:
    """LoRA of every segment in eager PyTorch; any device, dtype, rank and number of adapters.

    Note: saves what the kernels save (x, S, routing); masks are drawn again in backward.
    """

    name = "torch"
    tile = 1

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        adapters: LinearAdapters,
        routing: Routing,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``y = x Wᵀ + bias + scaling * S Bᵀ`` with ``S = drop(x) Aᵀ``, per segment.

        Args:
            x: ``[tokens, in]``.
            weight: ``[out, in]``, frozen.
            bias: ``[out]`` or None.
            adapters: the linear's adapters by slot.
            routing: of this microbatch.

        Returns:
            y ``[tokens, out]`` and S ``[tokens, most columns]``, None where no adapter is concerned.
        """
        y = F.linear(x, weight, bias)
        active = _active(adapters, routing)
        if not active:
            return y, None
        s = x.new_zeros(x.shape[0], max(adapter.columns for adapter, _ in active))
        for adapter, rows in active:
            s_rows = s[rows, : adapter.columns]
            torch.mm(_dropped(x, rows, adapter, adapters, routing)[0], adapter.a.t(), out=s_rows)
            y[rows].addmm_(s_rows, adapter.b.t(), alpha=adapter.scaling)
        return y, s

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
        """``dx = dy W + mask * (dS A)``, ``dS = scaling * dy B``; adds ``dA = dSᵀ drop(x)``, ``dB = scaling * dyᵀ S``.

        Returns:
            dx ``[tokens, in]``, None where ``needs_dx`` is False.
        """
        dx = dy @ weight if needs_dx else None
        for adapter, rows in _active(adapters, routing):
            assert s is not None
            dy_rows = dy[rows]
            ds = (dy_rows @ adapter.b) * adapter.scaling
            dropped, keep = _dropped(x, rows, adapter, adapters, routing)
            _accumulate(adapter.grad_a, ds, dropped, 1.0)
            mask = adapter.block_mask(adapters.row_projection)
            _accumulate(adapter.grad_b, dy_rows, s[rows, : adapter.columns], adapter.scaling, mask)
            if dx is None:
                continue
            if keep is None:
                dx[rows].addmm_(ds, adapter.a)
            else:
                dx[rows].add_(torch.where(keep, ds @ adapter.a, 0.0), alpha=dropout.keep_scale(adapter.dropout))
        return dx

    def reason_unsupported(self, x: torch.Tensor, weight: torch.Tensor) -> str | None:
        """Nothing is unsupported."""
        return None


def _active(adapters: LinearAdapters, routing: Routing) -> list[tuple[LinearAdapter, slice]]:
    return [
        (adapters.by_slot[segment.slot], slice(segment.start, segment.stop))
        for segment in routing.segments
        if segment.slot in adapters.by_slot
    ]


def _dropped(
    x: torch.Tensor, rows: slice, adapter: LinearAdapter, adapters: LinearAdapters, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The adapter's input after dropout, and the mask (None without dropout)."""
    if adapter.dropout == 0.0:
        return x[rows], None
    keep = dropout.keep_mask(
        routing.row_keys[rows],
        adapters.module_key,
        adapters.in_features,
        adapter.dropout,
        feature_offset=adapters.feature_offset,
    )
    return torch.where(keep, x[rows] * dropout.keep_scale(adapter.dropout), 0.0), keep


def _accumulate(
    grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> None:
    """``grad += scale * leftᵀ right`` with the sum over tokens kept in the gradient's own precision."""
    if left.dtype == grad.dtype:
        product = left.t() @ right
    elif left.is_cuda:
        product = torch.mm(left.t(), right, out_dtype=grad.dtype)
    else:
        product = left.t().to(grad.dtype) @ right.to(grad.dtype)
    grad.add_(product if mask is None else torch.where(mask, product, 0.0), alpha=scale)
