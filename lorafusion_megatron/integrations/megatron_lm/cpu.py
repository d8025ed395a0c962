"""Megatron's training code on a machine without a GPU: what `mcore.cpu_compat` leaves to `megatron.training`.

For tests and for trying a script on a laptop. Each module gets its own view of ``torch``; PyTorch stays as it is.
"""

import contextlib
import types
from typing import Any

import torch

from ...mcore import cpu_compat
from .patches import Patch


class _CudaOnCpu(types.ModuleType):
    """``torch.cuda`` as one module sees it: one device, whose streams are always done."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.is_available = lambda: True
        self.device_count = lambda: 1
        self.set_device = lambda device: None
        self.Stream = lambda *_, **__: cpu_compat.SynchronousStream()
        self.stream = lambda stream: contextlib.nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class NoDeviceArchitecture:
    """In place of `get_device_arch_version`: no rule about older GPUs holds here. Knows what it stands in for."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self) -> int:
        return 10


def relax_validation() -> None:
    """Let Megatron validate its arguments without asking a GPU for its age; nothing with a GPU."""
    from megatron.training import arguments

    if not torch.cuda.is_available() and not isinstance(arguments.get_device_arch_version, NoDeviceArchitecture):
        arguments.get_device_arch_version = NoDeviceArchitecture(arguments.get_device_arch_version)


def restore_validation() -> None:
    """Undo `relax_validation`."""
    from megatron.training import arguments

    if isinstance(arguments.get_device_arch_version, NoDeviceArchitecture):
        arguments.get_device_arch_version = arguments.get_device_arch_version.original


def _view() -> cpu_compat.TorchOnCpu:
    view = cpu_compat.TorchOnCpu()
    view.cuda = _CudaOnCpu()
    return view


def patches() -> list[Patch]:
    """What is replaced; `mcore.cpu_compat.install` comes beside it."""
    from megatron.core import utils as core_utils
    from megatron.training import initialize, training
    from megatron.training.models import dist_utils
    from megatron.training.utils import common_utils

    return [
        # "Megatron requires CUDA", and process groups only where a device is counted.
        Patch(owner=initialize, attribute="torch", value=_view()),
        # Start times, flags and losses with device="cuda"; the stream around the DDP wrapper.
        Patch(owner=training, attribute="torch", value=_view()),
        Patch(owner=dist_utils, attribute="torch", value=_view()),
        # --log-params-norm.
        Patch(owner=common_utils, attribute="torch", value=_view()),
        Patch(owner=core_utils, attribute="torch", value=_view()),
        # Compiles fused kernels ahead; the C++ compiler takes a minute for what tests never call.
        Patch(owner=training, attribute="set_jit_fusion_options", value=lambda *_, **__: None),
        # get_model moves the model to the current device, and a tied output layer its weight: that is the CPU here.
        Patch(owner=torch.nn.Module, attribute="cuda", value=lambda self, device=None: self),
        Patch(owner=torch.Tensor, attribute="cuda", value=lambda self, *_, **__: self),
    ]
