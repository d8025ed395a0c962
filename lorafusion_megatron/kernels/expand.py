"""Adding the adapter's part to a finished frozen product in place: y += S Bᵀ, or dx += mask ∘ (dS A).

For what the fused product does not serve: fp32, GPUs without bulk tensor copies, unaligned rows. Costs one more
read and write of the output.
"""

import torch
import triton
import triton.language as tl

from .adapter_part import adapter_tile, drop_tile
from .launch import Launcher, cdiv, power_of_two
from .overlap import await_predecessor, launch_options
from .tables import slot_columns


@triton.jit(do_not_specialize=["tokens", "num_slots", "module_key", "feature_offset"])
def _expand_kernel(
    y_ptr, q_ptr, q_stride, table, tile_slots, keys, tokens, width, num_slots, module_key, feature_offset,
    FACTOR: tl.constexpr, DROP: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr, KC: tl.constexpr,
    ALIGN: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows by BN output features."""
    await_predecessor(OVERLAP)
    tile, col = tl.program_id(0), tl.program_id(1) * BN
    slot = tl.load(tile_slots + tile)
    if slot_columns(table, slot, num_slots, ALIGN) == 0:
        return
    acc = adapter_tile(
        tl.zeros((TILE, BN), tl.float32), q_ptr, q_stride, table, tile_slots, tile * TILE, col, tokens, width,
        num_slots, FACTOR, TILE, 1, TILE, BN, KC, False, ALIGN, PRECISION,
    )  # fmt: skip
    if DROP:
        acc = drop_tile(
            acc,
            table,
            tile_slots,
            keys,
            tile * TILE,
            col,
            tokens,
            num_slots,
            module_key,
            feature_offset,
            TILE,
            TILE,
            BN,
        )
    rows, feature = tile * TILE + tl.arange(0, TILE), col + tl.arange(0, BN)
    mask = (rows < tokens)[:, None] & (feature < width)[None, :]
    at = y_ptr + rows.to(tl.int64)[:, None] * width + feature[None, :]
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (y + acc).to(y_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(_expand_kernel)


def expand_(
    y: torch.Tensor,
    q: torch.Tensor,
    table: torch.Tensor,
    tile_slots: torch.Tensor,
    keys: torch.Tensor,
    *,
    factor: int,
    tile: int,
    module_key: int,
    feature_offset: int,
    drop: bool,
    align: int,
    overlap: bool,
) -> None:
    """``y += q Bᵀ`` (factor B) or ``y += mask ∘ (q A)`` (factor A), in place.

    Args:
        y: ``[tokens, features]``, contiguous.
        q: ``[tokens, columns]``: S or dS.
        table, tile_slots, keys, factor, tile, module_key, feature_offset, drop, align, overlap:
            as in `product.product`.
    """
    tokens, width = y.shape
    bn = 128 if y.element_size() == 2 else 64
    _launch(
        (tile_slots.shape[0], cdiv(width, bn), 1),
        (y, q, q.shape[1], table, tile_slots, keys, tokens, width, table.shape[0], module_key, feature_offset),
        FACTOR=factor, DROP=drop, TILE=tile, BN=bn, KC=min(power_of_two(q.shape[1]), 64),
        ALIGN=align, OVERLAP=overlap, PRECISION="ieee",
        options=launch_options(overlap, num_warps=4, num_stages=2),
    )  # fmt: skip
