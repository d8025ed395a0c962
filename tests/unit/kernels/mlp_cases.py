"""Random SwiGLU MLPs with adapters on both linears, and the check that the fused one must pass."""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from kernel_cases import Case, as_dtype, largest_ratio, random_case

from lorafusion_megatron.lora.autograd import lora_linear
from lorafusion_megatron.lora.reference import TorchBackend
from lorafusion_megatron.lora.swiglu_mlp import swiglu_mlp


@dataclass(frozen=True, kw_only=True)
class MlpCase:
    """Both linears under one routing."""

    fc1: Case
    fc2: Case

    def to(self, dtype: torch.dtype) -> "MlpCase":
        """The same numbers in another dtype, with gradient buffers of their own."""
        return MlpCase(fc1=as_dtype(self.fc1, dtype), fc2=as_dtype(self.fc2, dtype))


def random_mlp(
    seed: int, *, tokens: int, hidden: int, features: int, slots: int, dtype: torch.dtype, device: str = "cpu",
    ranks: list[int] | None = None,
) -> MlpCase:  # fmt: skip
    """An MLP whose second linear lacks one more adapter than the first: rows with both, with one and with none."""
    rng = random.Random(seed)
    options = {"tokens": tokens, "slots": slots, "dtype": dtype, "device": device, "ranks": ranks or [1, 3, 8, 16, 20]}
    fc1 = random_case(seed, size=(hidden, 2 * features), projections=rng.choice([1, 2]), **options)
    fc2 = random_case(seed, size=(features, hidden), feature_offset=2 * rng.randint(0, 99), **options)
    if len(fc2.adapters.by_slot) > 2:
        del fc2.adapters.by_slot[max(fc2.adapters.by_slot)]
    return MlpCase(fc1=fc1, fc2=replace(fc2, routing=fc1.routing))


def composed(case: MlpCase) -> tuple[torch.Tensor, ...]:
    """(out, dx, gradients of all factors) of linear, activation, linear in PyTorch."""
    backend, anchor = TorchBackend(), torch.empty(0, device=case.fc1.x.device, requires_grad=True)

    def forward(x):
        y = lora_linear(x, case.fc1.weight, case.fc1.adapters, case.fc1.routing, backend=backend, anchor=anchor)
        gate, up = y.chunk(2, dim=-1)
        act = F.silu(gate) * up
        return lora_linear(act, case.fc2.weight, case.fc2.adapters, case.fc2.routing, backend=backend, anchor=anchor)

    return _run(case, forward)


def fused(backend, case: MlpCase) -> tuple[torch.Tensor, ...]:
    """The same from `swiglu_mlp`."""
    fc1, fc2 = case.fc1, case.fc2
    anchor = torch.empty(0, device=fc1.x.device, requires_grad=True)
    assert backend.fuses_swiglu(fc1.adapters, fc2.adapters, fc1.routing)
    return _run(
        case,
        lambda x: swiglu_mlp(
            x, fc1.weight, fc2.weight, fc1.adapters, fc2.adapters, fc1.routing, backend=backend, anchor=anchor
        ),
    )


def _run(case: MlpCase, forward) -> tuple[torch.Tensor, ...]:
    adapters = [*case.fc1.adapters.by_slot.values(), *case.fc2.adapters.by_slot.values()]
    before = [(a.grad_a.clone(), a.grad_b.clone()) for a in adapters]
    x = case.fc1.x.detach().requires_grad_()
    out = forward(x)
    (dx,) = torch.autograd.grad(out, x, case.fc2.dy)
    grads = []
    for adapter, (a, b) in zip(adapters, before, strict=True):
        grads += [adapter.grad_a - a, adapter.grad_b - b]
    return out.detach(), dx, *grads


def worst_mlp_ratio(backend, case: MlpCase) -> float:
    """As `kernel_cases.worst_ratio`."""
    dtype = case.fc1.x.dtype
    exact, eager, got = composed(case.to(torch.float64)), composed(case.to(dtype)), fused(backend, case.to(dtype))
    return largest_ratio(got, eager, exact, dtype)
