"""Launches compiled kernels with little work on the host.

Triton sorts a call's arguments anew each time: 40 to 80 microseconds a launch, of which a linear needs six, so short
microbatches would wait for Python. What Triton compiles depends on few facts: the constants, and of each argument its
type, whether an address is a multiple of 16, and whether a number is 1 or a multiple of 16. A launcher keeps the
compiled kernel by these facts and hands it plain addresses. The layout of a descriptor's block must follow from the
block's shape and type, and a constant must not be a bool here and a number there: neither is told apart.
"""

from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction


class Launcher:
    """One kernel.

    Args:
        kernel: a function under ``triton.jit`` or ``gluon.jit`` whose constants come after its other parameters.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        is_compiled = isinstance(kernel, JITFunction)
        self._free = frozenset(p.num for p in kernel.params if p.do_not_specialize) if is_compiled else None

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        *,
        options: dict[str, Any] | None = None,
        **constants: Any,
    ) -> None:
        """Launch.

        Args:
            grid: programs along each axis.
            arguments: tensors and tensor descriptors on the current device, ``int`` or None, in the kernel's order.
            options: Triton's own (``num_warps``, ``num_stages``, ``maxnreg``, ``launch_pdl``).
            **constants: the kernel's constants, in its order.

        Raises:
            TypeError: an argument of another type, for which Triton may compile other code.

        Note: tensors are checked by Triton when it compiles; later ones of the same facts are taken as they are.
        """
        options = options or {}
        if self._free is None:  # the interpreter
            self._kernel[grid](*arguments, **constants, **options)
            return
        facts, values = _sorted_out(arguments, self._free)
        key = (*facts, *constants.values(), *options.items())
        found = self._compiled.get(key)
        if found is None:
            self._compiled[key] = self._compile_and_launch(grid, arguments, constants, options)
            return
        kernel, tail = found
        kernel[grid](*values, *tail)  # type: ignore[index]

    def _compile_and_launch(
        self, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...]]:
        """(compiled kernel, its constants); with fewer stages than asked for where the device lacks shared memory.

        Raises:
            OutOfResources: even one stage is too much.
        """
        while True:
            try:
                kernel = self._kernel[grid](*arguments, **constants, **options)
            except OutOfResources:
                stages = options.get("num_stages", 1) - 1
                if stages < 1:
                    raise
                options = options | {"num_stages": stages}
                if "STAGES" in constants:
                    constants = constants | {"STAGES": stages}
            else:
                return kernel, tuple(constants.values())


def _sorted_out(arguments: tuple[Any, ...], free: frozenset[int]) -> tuple[list[Any], list[Any]]:
    """(what the compiled code depends on, what the launch passes)."""
    facts: list[Any] = []
    values: list[Any] = []
    for at, argument in enumerate(arguments):
        kind = type(argument)
        if kind is int:
            facts.append("i32" if -0x80000000 <= argument <= 0x7FFFFFFF else "i64" if argument < 1 << 63 else "u64")
            if at not in free:
                facts.append("one" if argument == 1 else argument & 15 == 0)
            values.append(argument)
        elif kind is torch.Tensor or isinstance(argument, torch.Tensor):
            if not at:
                facts.append(argument.get_device())
            address = argument.data_ptr()
            facts.append(argument.dtype)
            facts.append(address & 15 == 0)
            values.append(address)
        elif argument is None:
            facts.append(None)
            values.append(None)
        elif isinstance(getattr(argument, "base", None), torch.Tensor):
            facts.append((argument.base.dtype, argument.base.get_device(), *argument.block_shape))
            values.append(argument)
        else:
            raise TypeError(f"argument {at} is a {kind.__name__}; kernels take tensors, descriptors, int and None")
    return facts, values


def cdiv(value: int, by: int) -> int:
    """``ceil(value / by)``; Triton's own is made for its compiler and takes microseconds."""
    return -(-value // by)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not less than a positive value."""
    return 1 << (value - 1).bit_length()
