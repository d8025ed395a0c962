"""The frozen product with the adapters' part in it, by the way that is fastest on this device."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..kernels import tables
from ..kernels.expand import expand_
from ..kernels.product import ProductConfig, product
from ..kernels.product_hopper import hopper_product
from ..kernels.tuning import EXPAND, FUSED, GROUPS, HOPPER, Problem, Tuner, Way, cache_path, expand_is_hopeless
from .adapters import LinearAdapters
from .routing import Routing
from .triton_device import TritonDevice
from .triton_slots import Call, is_pure, signed

FACTOR_B = tables.FACTOR_B.value


class Operands(NamedTuple):
    """One product of a linear and a microbatch."""

    z: torch.Tensor
    """x ``[tokens, in]`` of the forward, dy ``[tokens, out]`` of the backward."""
    weight: torch.Tensor
    """``[out, in]``, frozen."""
    bias: torch.Tensor | None
    """``[out]``, of the forward alone."""
    q: torch.Tensor
    """S or dS, ``[tokens, call.width]``."""
    call: Call
    adapters: LinearAdapters
    routing: Routing
    factor: int
    """``FACTOR_B`` of the forward, ``FACTOR_A`` of the backward."""

    @property
    def forward(self) -> bool:
        """Whether it is the forward's product."""
        return self.factor == FACTOR_B


class FusedProduct:
    """``x Wᵀ + bias + S Bᵀ`` of the forward, ``dy W + mask * (dS A)`` of the backward.

    Args:
        device: whose ways these are.
        strategy: ``auto`` measures all of them; a kind of way allows that one alone, where the device has it.
        tile: rows that hold one adapter.
    """

    def __init__(self, device: TritonDevice, strategy: str, *, tile: int) -> None:
        self._device = device
        self._strategy = strategy
        self._tile = tile
        # What is best of fewer ways is no answer for a process that may take all.
        self.tuner = Tuner(cache_path(device.device) if strategy == "auto" else None) if device.present else None
        """None takes the likeliest way unmeasured."""
        self.chosen: dict[tuple[Any, ...], Way] = {}

    def __call__(self, operands: Operands) -> torch.Tensor:
        """The product: ``[tokens, out]`` of the forward, ``[tokens, in]`` of the backward."""
        return self._run(self._way(operands), operands)

    def _way(self, of: Operands) -> Way:
        """How the product is computed: the way that is fastest here, measured when the problem is first seen."""
        z, call = of.z, of.call
        fuses = self._fuses(z, of.weight)
        bucket = (z.shape[0] - 1).bit_length()
        key = (bucket, *of.weight.shape, call.width, of.forward, call.drop, z.dtype, fuses)
        way = self.chosen.get(key)
        if way is not None:
            return way
        ways = self._ways(fuses=fuses)
        if self.tuner is None or len(ways) == 1:
            return self.chosen.setdefault(key, ways[0])
        problem = Problem(
            tokens=1 << bucket, inner=z.shape[1], width=of.weight.shape[0 if of.forward else 1],
            columns=call.width, forward=of.forward, drop=call.drop, dtype=str(z.dtype),
        )  # fmt: skip
        by_name = {way.name: way for way in ways}
        choice = self.tuner.known(problem)
        if choice not in by_name:
            if torch.cuda.is_current_stream_capturing():
                return ways[0]
            choice = self.tuner.measure(
                problem,
                {
                    name: partial(self._run, way, of)
                    for name, way in by_name.items()
                    if way.kind != EXPAND or not expand_is_hopeless(problem)
                },
            )
        # Where no way had room, the tuner names the one that always has, whatever the strategy.
        return self.chosen.setdefault(key, by_name.get(choice, Way(EXPAND)))

    def _ways(self, *, fuses: bool) -> list[Way]:
        """Every way to compute a product on this device that ``strategy`` allows, the likeliest first."""
        ways = []
        if fuses:
            if self._device.hopper and self._strategy in ("auto", HOPPER):
                ways = [Way(HOPPER, group) for group in GROUPS]
            elif self._strategy in ("auto", FUSED):
                ways = [Way(FUSED, group) for group in GROUPS]
        if not ways or self._strategy in ("auto", EXPAND):
            ways.append(Way(EXPAND))
        return ways

    def _run(self, way: Way, of: Operands) -> torch.Tensor:
        """The frozen product with the adapters' part in it."""
        z, weight, bias, q, call, adapters, routing, factor = of
        routed = (call.slots.table, routing.tile_slots, routing.row_keys)
        shared = {
            "factor": factor,
            "tile": self._tile,
            "module_key": signed(adapters.module_key),
            "feature_offset": adapters.feature_offset,
            "drop": call.drop and not of.forward,
            "align": call.slots.align,
            "overlap": self._device.overlap,
        }
        if way.kind == HOPPER:
            return hopper_product(
                z, weight, bias, q, *routed,
                programs=self._device.programs, group=way.group,
                arrivals=self._device.zeros("arrivals", 2), cache_bytes=self._device.cache_bytes, **shared,
            )  # fmt: skip
        if way.kind == FUSED:
            config = ProductConfig(group=way.group)
            return product(
                z, weight, bias, q, *routed, config=config, programs=self._device.programs,
                pure=is_pure(routing, config.block_m), **shared,
            )  # fmt: skip
        y = F.linear(z, weight, bias) if of.forward else torch.mm(z, weight)
        expand_(y, q, *routed, **shared)
        return y

    def _fuses(self, z: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether the fused products can run: bulk copies need 16-bit types and 16-byte rows."""
        return (
            self._device.bulk_copies
            and z.element_size() == 2
            and not any(size % 8 for size in (*weight.shape, z.stride(0)))
            and not any(tensor.data_ptr() % 16 for tensor in (z, weight))
            and weight.is_contiguous()
        )
