"""Runs unmodified Megatron-Core 0.19 on a machine without a GPU: named patches, installed only there.

Megatron names ``torch.cuda`` in a handful of places of its CPU-capable code. Each patch replaces exactly one of
those, says which, and is undone by `uninstall`. With a GPU present, `install` does nothing and returns False.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch

CPU = torch.device("cpu")

Patch = tuple[Any, str, Any]


class TorchOnCpu(types.ModuleType):
    """``torch`` as one Megatron module sees it: factories called with a literal ``device="cuda"`` stay on the CPU."""

    FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand")

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self.FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    @staticmethod
    def _on_cpu(factory: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class SynchronousStream:
    """In place of a CUDA stream: work on the CPU is done when the call returns, so every wait is over."""

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *_: Any) -> None: ...


def _rng_patches() -> list[Patch]:
    """Random states for sequence-parallel regions and activation checkpoints live in the CPU generator."""
    from megatron.core.tensor_parallel import random as mrandom

    class CpuRngStatesTracker(mrandom.CudaRNGStatesTracker):
        """Megatron's bookkeeping on the default CPU generator."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} or its seed {seed} was added before")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    def seed_cpu(seed: int) -> None:
        torch.manual_seed(seed)

    return [
        (mrandom, "CudaRNGStatesTracker", CpuRngStatesTracker),
        (mrandom, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state()),
        (mrandom, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state)),
        (torch.cuda, "manual_seed", seed_cpu),
    ]


def patches() -> dict[str, list[Patch]]:
    """Name -> (object, attribute, value) of everything that is replaced."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer import utils as transformer_utils

    return {
        # Pipeline receive buffers, rotary tables, tensor-parallel gather buffers.
        "current_device": [(torch.cuda, "current_device", lambda: CPU)],
        # P2PCommunicator, after each exchange of shapes and each batched exchange.
        "synchronize": [(torch.cuda, "synchronize", lambda device=None: None)],
        # The gradient reduction of Megatron's DDP wrapper.
        "current_stream": [(torch.cuda, "current_stream", lambda device=None: SynchronousStream())],
        # schedules.py: the token counter has device="cuda".
        "schedules_device": [(schedules, "torch", TorchOnCpu())],
        # transformer/utils.py: the causal mask has device="cuda".
        "mask_device": [(transformer_utils, "torch", TorchOnCpu())],
        "rng": _rng_patches(),
    }


_saved: list[Patch] = []


def install() -> bool:
    """Put the patches in place unless a GPU is there or they are in place; True where this call installed them."""
    if torch.cuda.is_available() or _saved:
        return False
    for group in patches().values():
        for owner, attribute, value in group:
            _saved.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)
    return True


def uninstall() -> None:
    """Put everything back as it was."""
    while _saved:
        owner, attribute, value = _saved.pop()
        setattr(owner, attribute, value)
