"""Whether this CPU multiplies bfloat16 at a useful rate: without instructions for it, it takes many times float32's."""

import time

import torch
import torch.nn.functional as F

SLOW = 1.5
"""Times of a float32 product from which float32 is advised, although its weights take twice the memory."""
_ROWS, _FEATURES, _RUNS = 64, 256, 5


def bfloat16_cost() -> float:
    """Time of a frozen linear's two products, ``x Wᵀ`` and ``dy W``, in bfloat16 over that in float32 on this CPU.

    Note: *measured* 18 to 30 on a CPU with AVX2 alone; a whole run took 0.4 times float32's on one with AVX-512 BF16.
    Best of five runs each, 20 ms in all.
    """
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def slow_dtype_note(dtype: str, device: str) -> str | None:
    """Advice for a run whose dtype this machine is slow at; None where it is not.

    Args:
        dtype: ``base_model.dtype``.
        device: "cuda" or "cpu".
    """
    if device != "cpu" or dtype != "bfloat16":
        return None
    cost = bfloat16_cost()
    if cost < SLOW:
        return None
    return (
        f"a bfloat16 product takes {cost:.1f} times as long as a float32 one on this CPU: "
        "base_model.dtype=float32 trains faster"
    )


def fastest_dtype() -> str:
    """``base_model.dtype`` for a run on this CPU that is free to choose."""
    return "bfloat16" if bfloat16_cost() < 1 else "float32"


def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(_ROWS, _FEATURES, dtype=dtype), torch.ones(_FEATURES, _FEATURES, dtype=dtype)
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        F.linear(x, weight).mm(weight)
        times.append(time.perf_counter() - start)
    return min(times)
