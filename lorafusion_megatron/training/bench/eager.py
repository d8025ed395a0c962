"""LoRA as other stacks do it: plain PyTorch operations beside the frozen linear, gradients by autograd.

y = linear(x) + scaling * B (A dropout(x))
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...lora.layout import TargetLinear
from ...lora.routing import current_routing
from ...mcore.steps import StepRule
from ...types import AdapterSpec, StepReport

Factors = tuple[torch.nn.Parameter, torch.nn.Parameter]


class EagerLora:
    """Mixin over Megatron's own linear: its forward, then the adapters of the microbatch's rows.

    With one job in a microbatch it is what Megatron-Bridge and PEFT run; with several, each job's rows apart.
    """

    eager_adapters: Mapping[int, Factors]
    eager_specs: Mapping[int, AdapterSpec]

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's linear: x ``[s, b, in]`` to (y ``[s, b, out]``, bias)."""
        y, bias = super().forward(x)  # type: ignore[misc]
        routing = current_routing()
        segments = routing.segments if routing is not None else ()
        if len(segments) == 1 and segments[0].stop == x.shape[0]:
            return y + self._delta(x, segments[0].slot), bias
        parts = [self._delta(x[s.start : s.stop], s.slot) for s in segments]
        end = segments[-1].stop if segments else 0
        if end < x.shape[0]:
            parts.append(y.new_zeros(x.shape[0] - end, *y.shape[1:]))
        return y + torch.cat(parts), bias

    def _delta(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        (a, b), spec = self.eager_adapters[slot], self.eager_specs[slot]
        return spec.scaling * F.linear(F.linear(F.dropout(x, spec.dropout), a), b)


def eager_factors(target: TargetLinear, spec: AdapterSpec, dtype: torch.dtype) -> Factors:
    """A and B of one adapter on one whole linear."""
    linear = target.adapters
    a = torch.empty(spec.rank, linear.in_features, dtype=dtype, device=target.device).normal_(std=0.02)
    b = torch.empty(linear.out_features, spec.rank, dtype=dtype, device=target.device).normal_(std=0.02)
    return torch.nn.Parameter(a), torch.nn.Parameter(b)


class _Loss:
    """Where the window adds a job's loss."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)


class IdleSteps:
    """In place of optimizer steps where there is nothing to optimize."""

    pending = ready = stopped = False
    applied = 0

    def __init__(self, device: torch.device) -> None:
        self.shard = _Loss(device)

    def end_step(self, step: int) -> None:
        """Nothing to do."""

    def apply(self) -> StepReport | None:
        """Nothing to do."""
        raise AssertionError("never pending")


class EagerSteps(IdleSteps):
    """PyTorch's fused AdamW over an adapter's parameters, clipped by the norm on this stage.

    Note: cheaper than a real baseline, which sums the norm over the stages and waits for it.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], rule: StepRule, device: torch.device) -> None:
        super().__init__(device)
        self.parameters: Sequence[torch.nn.Parameter] = list(parameters)
        self.rule = rule
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rule.lr_at(1), betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay,
            fused=device.type == "cuda",
        )  # fmt: skip

    def end_step(self, step: int) -> None:
        """The gradients are whole."""
        self.pending = self.ready = True

    def apply(self) -> StepReport | None:
        """Clip, step, drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.rule.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending = self.ready = False
        self.applied += 1
        return None
