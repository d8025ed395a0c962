"""The Triton backend: the fused kernels over any number of adapters, each launch serving all of a microbatch's."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ..kernels import tables
from ..kernels.down import down
from ..kernels.dy_pass import dy_pass
from ..kernels.factor_grad import factor_grad, gradient_parts
from ..kernels.launch import power_of_two
from ..kernels.swiglu import swiglu_down, swiglu_grad
from .adapters import LinearAdapters
from .routing import Routing
from .triton_device import TritonDevice
from .triton_product import FusedProduct, Operands
from .triton_slots import Call, make_call, make_slots, signed, with_gaps, with_rows

TILE = 64
"""Rows per tile: the smallest that fills the matrix unit; larger ones waste more padding on every layer."""
WIDEST_JOINT, WIDEST_UNCACHED = 64, 32
"""Columns up to which dS and dB share one pass over dY, where the parts of dS fit the cache and where they don't;
beyond, writing and reading the parts outweighs a second pass (measured, docs/kernels.md)."""
FACTOR_A, FACTOR_B = tables.FACTOR_A.value, tables.FACTOR_B.value
GRAD_A, GRAD_B = tables.GRAD_A.value, tables.GRAD_B.value


class TritonBackend:
    """Fused kernels: one pass over X, one product, one pass over dY, one product, one pass over X.

    Args:
        device: where the linears live; without an index the current GPU, for good.
        strategy: ``auto`` measures; ``hopper`` and ``fused`` put the adapter's part inside the product, ``expand``
            adds it to cuBLAS' product in place. What the device lacks falls back to ``expand``.
        concurrent: whether the pass for A's gradient runs beside the backward's product, where its last wave leaves
            multiprocessors idle (8192 x 4096 outputs are 7.8 waves of 132).
        interpret: run on the CPU; TRITON_INTERPRET=1 must have been set before the kernels were imported.

    Note: never synchronises with the host; capturable in a CUDA graph after one call outside it, which builds the
    tables and the counters. Saves S in x's dtype and nothing else of the size of the tokens.
    Calls share counters: one thread and one stream at a time.
    """

    name = "triton"
    tile = TILE

    def __init__(
        self,
        device: torch.device | str = "cuda",
        *,
        strategy: str = "auto",
        concurrent: bool = True,
        interpret: bool = False,
    ) -> None:
        self._device = TritonDevice.of(device, interpret=interpret)
        self.device = self._device.device
        self.interpret = interpret
        self._concurrent = concurrent
        self._product = FusedProduct(self._device, strategy, tile=TILE)

    def reason_unsupported(self, x: torch.Tensor, weight: torch.Tensor) -> str | None:
        """Why these tensors can't go through the kernels; None where they can."""
        if x.device.type != "cuda" and not self.interpret:
            return f"the kernels need a GPU; the input is on {x.device.type}"
        if x.device.type == "cuda" and x.device != self.device:
            return f"this backend is for {self.device}; the input is on {x.device}"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the kernels compute in float32, bfloat16 or float16, not {x.dtype}"
        if x.dtype != weight.dtype:
            return f"input is {x.dtype} and weight {weight.dtype}; the kernels need one type"
        if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
            return "the kernels need compute capability 8.0 or newer"
        return None

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        adapters: LinearAdapters,
        routing: Routing,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``y = x Wᵀ + bias + S Bᵀ`` with ``S = scaling * drop(x) Aᵀ``.

        Args:
            x: ``[tokens, in]``.
            weight: ``[out, in]``, frozen.
            bias: ``[out]`` or None.
            adapters: the linear's adapters by slot.
            routing: of this microbatch, with this backend's tile.

        Returns:
            y ``[tokens, out]`` and S ``[tokens, widest adapter]``, None where no adapter is concerned.
        """
        call = self._call(adapters, routing)
        if call is None:
            return F.linear(x, weight, bias), None
        x = with_rows(x)
        s = self._down(x, call, adapters, routing, factor=FACTOR_A, drop=call.drop)
        return self._product(Operands(x, weight, bias, s, call, adapters, routing, FACTOR_B)), s

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
        """``dx = dy W + mask * (dS A)``, ``dS = scaling * dy B``; adds ``dA = dSᵀ drop(x)`` and ``dB = dyᵀ S``.

        Returns:
            dx ``[tokens, in]``, None where ``needs_dx`` is False.
        """
        call = None if s is None else self._call(adapters, routing)
        if call is None:
            return dy @ weight if needs_dx else None
        assert s is not None
        dy, x = with_rows(dy), with_rows(x)
        ds = self._dy_products(dy, s, call, adapters, routing)
        return self._input_gradients(dy, ds, x, weight, call, adapters, routing, needs_dx=needs_dx)

    def _input_gradients(
        self,
        dy: torch.Tensor,
        ds: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        call: Call,
        adapters: LinearAdapters,
        routing: Routing,
        *,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """dx, and dA into the gradients."""
        if not needs_dx:
            self._prepared_grad(x, ds, call, adapters, routing, grad=GRAD_A)()
            return None
        # The product and dA are launched one right after the other: what dA needs is made before.
        add_da = self._prepared_grad(x, ds, call, adapters, routing, grad=GRAD_A, beside=self._concurrent)
        dx = self._product(Operands(dy, weight, None, ds, call, adapters, routing, FACTOR_A))
        add_da()
        return dx

    def fuses_swiglu(self, fc1: LinearAdapters, fc2: LinearAdapters, routing: Routing) -> bool:
        """Whether `swiglu_mlp_forward` serves these two linears and this microbatch.

        Both must have adapters in it, of at most 64 columns, and 16 must divide the features.
        """
        calls = self._call(fc1, routing), self._call(fc2, routing)
        return all(call is not None and call.width <= WIDEST_JOINT for call in calls) and fc2.in_features % 16 == 0

    def swiglu_mlp_forward(
        self,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        fc1: LinearAdapters,
        fc2: LinearAdapters,
        routing: Routing,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``out = LoRA_fc2(silu(gate) * up)`` with ``[gate | up] = y = LoRA_fc1(x)``.

        Returns:
            out ``[tokens, hidden]``, y ``[tokens, 2 * features]``, S of linear_fc1 and S of linear_fc2.
        """
        y, s1 = self.forward(x, weights[0], None, fc1, routing)
        call = self._call(fc2, routing)
        assert s1 is not None
        assert call is not None
        tiles = routing.tile_slots.shape[0]
        act, s2 = swiglu_down(
            y, call.slots.table, routing.tile_slots, routing.row_keys, self._device.zeros("down", tiles),
            width=call.width, tile=TILE, module_key=signed(fc2.module_key), feature_offset=fc2.feature_offset,
            drop=call.drop, splits=4 if y.shape[1] >= 4096 else 1, align=call.slots.align, overlap=self._device.overlap,
        )  # fmt: skip
        return self._product(Operands(act, weights[1], None, s2, call, fc2, routing, FACTOR_B)), y, s1, s2

    def swiglu_mlp_backward(
        self,
        d_out: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        scaled: tuple[torch.Tensor, torch.Tensor],
        weights: tuple[torch.Tensor, torch.Tensor],
        fc1: LinearAdapters,
        fc2: LinearAdapters,
        routing: Routing,
        *,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """dx of `swiglu_mlp_forward`; adds the gradients of both linears' adapters.

        Args:
            d_out: ``[tokens, hidden]``.
            x, y: of the forward.
            scaled: S of linear_fc1 and of linear_fc2.
            weights: of both.
        """
        call1, call2 = self._call(fc1, routing), self._call(fc2, routing)
        assert call1 is not None
        assert call2 is not None
        d_out = with_rows(d_out)
        ds2 = self._dy_products(d_out, scaled[1], call2, fc2, routing)
        d_act = self._product(Operands(d_out, weights[1], None, ds2, call2, fc2, routing, FACTOR_A))
        chunks, split = self._chunks(routing, strips=-(-d_act.shape[1] // 128), most=1024, everything=True)
        dy, ds1 = swiglu_grad(
            y, d_act, scaled[0], ds2, (call1.slots.table, call2.slots.table), chunks, routing.tile_slots,
            routing.row_keys, self._device.zeros("swiglu", 3 * chunks.shape[0] * -(-d_act.shape[1] // 16)),
            row_projection=fc1.row_projection, tile=TILE, module_key=signed(fc2.module_key),
            feature_offset=fc2.feature_offset, drop=call2.drop, split=split,
            aligns=(call1.slots.align, call2.slots.align), overlap=self._device.overlap,
        )  # fmt: skip
        return self._input_gradients(dy, ds1, with_rows(x), weights[0], call1, fc1, routing, needs_dx=needs_dx)

    def _call(self, adapters: LinearAdapters, routing: Routing) -> Call | None:
        active = [adapters.by_slot[segment.slot] for segment in routing.segments if segment.slot in adapters.by_slot]
        if not active:
            return None
        if routing.tile != TILE:
            raise ValueError(f"routing has tiles of {routing.tile} rows; the Triton backend needs {TILE}")
        slots = adapters.derived.get("triton")
        if slots is None or not slots.serves(adapters):
            if active[0].a.device != self.device:
                raise ValueError(f"adapters of {adapters.name} on {active[0].a.device}, a backend for {self.device}")
            slots = adapters.derived["triton"] = make_slots(adapters, self.device)
        return make_call(slots, active, routing)

    def _down(
        self, z: torch.Tensor, call: Call, adapters: LinearAdapters, routing: Routing, *, factor: int, drop: bool
    ) -> torch.Tensor:
        tiles = routing.tile_slots.shape[0]
        blocks = -(-call.width // 64)
        return down(
            z, call.slots.table, routing.tile_slots, routing.row_keys, self._device.zeros("down", tiles * blocks),
            factor=factor, width=call.width, tile=TILE, module_key=signed(adapters.module_key),
            feature_offset=adapters.feature_offset, drop=drop, splits=self._splits(tiles * blocks, z.shape[1]),
            align=call.slots.align,
            overlap=self._device.overlap,
        )  # fmt: skip

    def _splits(self, tiles: int, features: int) -> int:
        """Programs that share the features of a tile.

        Each number is compiled anew: powers of two, the same for all microbatches between two powers of two of rows.
        """
        splits = max(1, min(8, 2 * self._device.programs // power_of_two(tiles), features // 512))
        return 1 << (splits.bit_length() - 1)

    def _dy_products(
        self, dy: torch.Tensor, s: torch.Tensor, call: Call, adapters: LinearAdapters, routing: Routing
    ) -> torch.Tensor:
        """dS, and dB into the gradients."""
        strip = 512 if dy.shape[1] >= 16384 and call.width <= 16 else 256
        strips = -(-dy.shape[1] // strip)
        fits = 4 * dy.shape[0] * call.width * strips <= self._device.cache_bytes
        if call.width > (WIDEST_JOINT if fits else WIDEST_UNCACHED):
            self._prepared_grad(dy, s, call, adapters, routing, grad=GRAD_B)()
            return self._down(dy, call, adapters, routing, factor=FACTOR_B, drop=False)
        chunks, split = self._chunks(routing, strips=strips, most=2048)
        return dy_pass(
            dy, s, call.slots.table, chunks, routing.tile_slots,
            self._device.zeros("dy", chunks.shape[0] * -(-dy.shape[1] // 64)),
            row_projection=adapters.row_projection, tile=TILE, split=split, align=call.slots.align,
            block_n=strip,
            overlap=self._device.overlap,
        )  # fmt: skip

    def _prepared_grad(
        self,
        z: torch.Tensor,
        q: torch.Tensor,
        call: Call,
        adapters: LinearAdapters,
        routing: Routing,
        *,
        grad: int,
        beside: bool = False,
    ) -> Callable[[], None]:
        """What adds a factor's gradient, with all at hand that it needs."""
        of_a = grad == GRAD_A
        chunks, split = self._chunks(routing, strips=-(-z.shape[1] // 128), most=1024)
        counters = chunks.shape[0] * -(-z.shape[1] // 64) * -(-call.width // 64)
        return partial(
            factor_grad, z, q, call.slots.table, chunks, routing.row_keys, self._device.zeros("grad", counters),
            gradient_parts(z, q, call.slots.table, chunks, split=split),
            grad=grad, row_projection=None if of_a else adapters.row_projection, module_key=signed(adapters.module_key),
            feature_offset=adapters.feature_offset, drop=call.drop and of_a, align=call.slots.align,
            overlap=self._device.overlap, beside=beside,
        )  # fmt: skip

    def _chunks(
        self, routing: Routing, *, strips: int, most: int, everything: bool = False
    ) -> tuple[torch.Tensor, bool]:
        """Chunk table that gives about a program a multiprocessor, and whether a segment was cut.

        Note: measured on an H100: long chunks win as soon as three quarters of the multiprocessors have one, since
        each chunk's part of the gradient is written and read once more.
        """
        wanted = max(1, 3 * self._device.programs // (4 * strips))
        rows = min(most, max(4 * TILE, -(-routing.num_tokens // (wanted * TILE)) * TILE))
        key = ("chunks", rows, everything)
        if key not in routing.derived:
            segments = [(segment.slot, segment.start, segment.stop) for segment in routing.segments]
            if everything:
                segments = with_gaps(segments, routing.num_tokens)
            table = tables.chunk_table(segments, rows_per_chunk=rows)
            device = routing.row_keys.device
            if device.type == "cuda":  # from pageable memory the host would wait for the copy
                table = table.pin_memory()
            routing.derived[key] = (table.to(device, non_blocking=True), table.shape[0] > len(segments))
        return routing.derived[key]
