"""How fast training goes, per GPU and against what the GPU's matrix units reach."""

import time
from dataclasses import dataclass

import torch

from ..types import ModelSpec


def flops_per_token(spec: ModelSpec) -> float:
    """Forward and backward of the frozen model's products: 4 flop a parameter and token, attention left out.

    Note: a frozen weight has no gradient, so it is 4 and not 6; adapters and recompute don't count.
    """
    width, groups = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    layer = spec.hidden_size * (2 * width + 2 * groups) + 3 * spec.hidden_size * spec.ffn_hidden_size
    return 4.0 * (spec.num_layers * layer + spec.hidden_size * spec.vocab_size)


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Flop/s of one large bf16 product, which stands for what the device reaches; 0 where it is no GPU.

    Note: takes about 50 ms and 400 MB for that time. A measurement instead of a table knows every GPU.
    """
    if device.type != "cuda":
        return 0.0
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - started)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What a window did."""

    tokens: int
    """Of all replicas' samples, without padding."""
    seconds: float
    processes: int
    flops_per_token: float
    peak_flops: float
    """Flop/s that one GPU reaches; 0 where it is not known."""
    bubble_share: float

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens per second of one process."""
        return self.tokens / self.seconds / self.processes

    @property
    def model_flops_share(self) -> float | None:
        """Share of the GPU's matrix rate that the frozen model's own products take; None where that is not known."""
        if not self.peak_flops:
            return None
        return self.tokens_per_second_per_gpu * self.flops_per_token / self.peak_flops

    def values(self) -> dict[str, float]:
        """For metrics and trackers."""
        out = {"tokens_per_second_per_gpu": self.tokens_per_second_per_gpu, "bubble_share": self.bubble_share}
        share = self.model_flops_share
        return out if share is None else out | {"model_flops_share": share}

    def __str__(self) -> str:
        text = f"{self.tokens_per_second_per_gpu:,.0f} tokens/s per GPU"
        share = self.model_flops_share
        if share is None:
            return text
        rate = self.tokens_per_second_per_gpu * self.flops_per_token / 1e12
        return f"{text}, {rate:,.0f} TFLOP/s per GPU: {share:.1%} of what one large matrix product reaches"
