"""Fused LoRA linears for any Hugging Face PEFT model, and back.

    from lorafusion_megatron.integrations.peft import fuse
    fuse(model)

The model keeps its modules, parameters, optimizer and checkpoints; only the forward of its LoRA linears changes.
"""

import dataclasses
import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..kernels import dropout
from ..lora.adapters import ALL_ROWS, LinearAdapter, LinearAdapters
from ..lora.autograd import Backend
from ..lora.reference import TorchBackend
from ..lora.routing import RoutedSegment, Routing, build_routing

logger = logging.getLogger(__name__)

KEPT_ROUTINGS = 8
"""Routings kept, one per number of rows: packed batches vary, generation asks for one row again and again."""


@dataclass(frozen=True, kw_only=True)
class FuseReport:
    """What `fuse` did."""

    fused: int
    """LoRA linears that now run fused."""
    left: dict[str, int]
    """Reason -> LoRA layers that keep PEFT's forward."""
    backend: str
    """``triton`` or ``torch``, both with "and" between, or ``none`` where nothing was fused."""


def fuse(model: nn.Module, *, backend: Backend | None = None) -> FuseReport:
    """Swap the forward of every LoRA linear of a PEFT model for the fused one.

    ``y = W x + bias + scaling * B (A drop(x))``, as PEFT computes it.

    Args:
        model: any module that holds PEFT LoRA linears.
        backend: what computes them, for a model on one device; None: the Triton kernels on a GPU, PyTorch elsewhere.

    Returns:
        How many were fused, and why others were not. Fusing twice changes nothing.

    Raises:
        UserError: the model holds no LoRA linear, or the backend that was given can't compute one of them.

    Note: the same numbers to rounding in the activations' dtype. Adapters that PEFT keeps in fp32 beside a 16-bit
    base are rounded to the activations' dtype where they are used (their gradients stay fp32): what mixed precision
    does. Dropout draws its seeds from PyTorch's CPU generator, so ``torch.manual_seed`` and gradient checkpointing
    govern it; the masks are not the bits that PEFT would draw. What the fused form does not cover when a layer runs
    (several active adapters, mixed batches, merged weights, DoRA and other variants) takes PEFT's forward.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no LoRA layers",
            rule="fuse works on PEFT models",
            remedy="get_peft_model first",
        )
    chosen: dict[torch.device, Backend] = {}
    routings: OrderedDict[tuple[int, torch.device], Routing] = OrderedDict()
    left: Counter[str] = Counter()
    names: set[str] = set()
    fused = 0
    if backend is not None:
        _check_backend(backend, layers)
    for layer in layers:
        reason = reason_unsupported(layer)
        if reason is None:
            if not isinstance(layer.__dict__.get("forward"), _FusedForward):
                weight = layer.get_base_layer().weight
                if weight.device not in chosen:
                    chosen[weight.device] = backend or _default_backend(weight)
                layer.forward = _FusedForward(layer, chosen[weight.device], routings)
            names.add(layer.forward.backend.name)
            fused += 1
        else:
            left[reason] += 1
    for reason, count in left.items():
        logger.warning("%d LoRA layers keep PEFT's forward: %s", count, reason)
    return FuseReport(fused=fused, left=dict(left), backend=" and ".join(sorted(names)) or "none")


def unfuse(model: nn.Module) -> int:
    """Give every fused linear of a model PEFT's forward again; returns how many there were."""
    count = 0
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _FusedForward):
            del module.forward
            count += 1
    return count


def reason_unsupported(layer: nn.Module) -> str | None:
    """Why a LoRA layer can never run fused; None where it can."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear:
        return f"{type(layer).__name__} layers are not plain linears"
    base = layer.get_base_layer()
    if type(base) is not nn.Linear:
        return f"base layer {type(base).__name__} is not torch.nn.Linear"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "the base layer is trained too"
    if not base.weight.dtype.is_floating_point or base.weight.element_size() < 2:
        return f"base weight is {base.weight.dtype}"
    return None


def _check_backend(backend: Backend, layers: list[nn.Module]) -> None:
    for layer in layers:
        if reason_unsupported(layer) is None:
            weight = layer.get_base_layer().weight
            reason = backend.reason_unsupported(weight, weight)
            if reason is not None:
                raise UserError(
                    f"the {backend.name} backend can't compute a linear of this model: {reason}",
                    rule="the backend that is given computes every LoRA linear",
                    remedy="leave it out (each device then gets its own), or give one that fits",
                )


def _default_backend(weight: torch.Tensor) -> Backend:
    """What computes linears on the device of a base weight: a backend's streams and tables belong to one GPU."""
    if weight.device.type != "cuda":
        return TorchBackend()
    from ..lora.triton_backend import TritonBackend

    backend = TritonBackend(weight.device)
    reason = backend.reason_unsupported(weight, weight)
    if reason is not None:
        logger.warning("LoRA linears run in PyTorch: %s", reason)
        return TorchBackend()
    return backend


class _FusedForward:
    """The forward of one LoRA linear: the fused function where it applies, PEFT's own elsewhere."""

    def __init__(self, layer: nn.Module, backend: Backend, routings: OrderedDict) -> None:
        self.layer, self.backend, self.routings = layer, backend, routings
        self.factors: dict[tuple[str, torch.dtype], _Factors] = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.layer
        name = None if args or kwargs else self._one_adapter()
        if name is None:
            return type(layer).forward(layer, x, *args, **kwargs)
        base = layer.get_base_layer()
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else base.weight.dtype
        )
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        weight = base.weight.to(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        drop = layer.lora_dropout[name]
        key = (name, dtype)
        if key not in self.factors:
            self.factors[key] = _Factors(a, b, dtype)
        adapters = self.factors[key].adapters(
            a, b, layer.scaling[name], drop.p if layer.training and isinstance(drop, nn.Dropout) else 0.0
        )
        # Kernels are launched on the current GPU, which need not be this layer's in a model over several.
        with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(rows):
            y = _FusedLinear.apply(rows, a, b, weight, bias, adapters, self._routing(rows), self.backend)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _one_adapter(self) -> str | None:
        """The adapter to apply, where it is exactly one plain one."""
        layer = self.layer
        if layer.disable_adapters or layer.merged:
            return None
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias.get(active[0], False):
            return None
        drop = layer.lora_dropout[active[0]]
        return active[0] if isinstance(drop, nn.Dropout | nn.Identity) else None

    def _routing(self, rows: torch.Tensor) -> Routing:
        """All rows to slot 0; the keys depend on the row alone, the call's seed comes as the module key."""
        key = (rows.shape[0], rows.device)
        if key not in self.routings:
            position = torch.arange(rows.shape[0], device=rows.device)
            zero = torch.zeros_like(position)
            segments = [RoutedSegment(slot=0, start=0, stop=rows.shape[0])] if rows.shape[0] else []
            self.routings[key] = build_routing(
                segments,
                num_tokens=rows.shape[0],
                tile=self.backend.tile,
                row_keys=dropout.row_keys(zero, zero, zero, position),
            )
            if len(self.routings) > KEPT_ROUTINGS:
                self.routings.popitem(last=False)
        self.routings.move_to_end(key)
        return self.routings[key]


class _Factors:
    """Factors of one adapter as the backends take them: in the activations' dtype, at addresses that stay."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.grad_a, self.grad_b = torch.zeros_like(a, dtype=wide), torch.zeros_like(b, dtype=wide)
        self.a, self.b = a.detach().to(dtype), b.detach().to(dtype)
        self._by_dropout: dict[tuple[float, float, int, int], LinearAdapters] = {}

    def adapters(self, a: torch.Tensor, b: torch.Tensor, scaling: float, drop: float) -> LinearAdapters:
        """The linear's adapters with the parameters' present values and a fresh dropout seed."""
        if a.dtype == self.dtype:
            self.a, self.b = a.detach(), b.detach()
        else:
            self.a.copy_(a.detach())
            self.b.copy_(b.detach())
        key = (scaling, drop, self.a.data_ptr(), self.b.data_ptr())
        if key not in self._by_dropout:
            if len(self._by_dropout) > 4:
                self._by_dropout.clear()
            adapter = LinearAdapter(
                a=self.a,
                b=self.b,
                grad_a=self.grad_a,
                grad_b=self.grad_b,
                scaling=scaling,
                dropout=drop,
                projections=(ALL_ROWS,),
                rank=a.shape[0],
            )
            self._by_dropout[key] = LinearAdapters(
                name="peft", module_key=0, in_features=a.shape[1], out_features=b.shape[0], by_slot={0: adapter}
            )
        seed = int(torch.randint(1 << 32, ())) if drop > 0.0 else 0
        # The copy shares what the backend derived from the same adapter.
        return dataclasses.replace(self._by_dropout[key], module_key=seed)


class _FusedLinear(torch.autograd.Function):
    """Saves x and S; gradients of A and B come back as tensors, as PEFT's optimizers expect."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        adapters: LinearAdapters,
        routing: Routing,
        backend: Backend,
    ) -> torch.Tensor:
        """x ``[tokens, in]`` to y ``[tokens, out]``; ``a`` and ``b`` are those in ``adapters``, for their gradients."""
        y, s = backend.forward(x, weight, bias, adapters, routing)
        ctx.save_for_backward(x, weight, s)
        ctx.adapters, ctx.routing, ctx.backend, ctx.dtypes = adapters, routing, backend, (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, a and b, in their dtypes; sums are fp32."""
        x, weight, s = ctx.saved_tensors
        grads = []
        for adapter in ctx.adapters.by_slot.values():
            grads = [adapter.grad_a.zero_(), adapter.grad_b.zero_()]
        dx = ctx.backend.backward(
            dy.contiguous(), x, weight, s, ctx.adapters, ctx.routing, needs_dx=ctx.needs_input_grad[0]
        )
        out = [
            grad.to(dtype, copy=True) if needed else None
            for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
        ]
        return dx, *out, None, None, None, None, None
