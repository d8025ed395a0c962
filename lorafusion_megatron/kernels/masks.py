"""The dropout mask of `dropout.keep_mask`, drawn inside a kernel."""

import torch
import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B9)
_M1 = tl.constexpr(0x7FEB352D)
_M2 = tl.constexpr(0x846CA68B)
_M3 = tl.constexpr(0xC2B2AE35)
NVIDIA = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)
"""Whether NVIDIA's instructions are to be had: not on AMD and not in the interpreter."""


@triton.jit
def load_keys(keys, rows, valid):
    """Both key words of the given rows, uint32."""
    at = keys + rows.to(tl.int64) * 2
    key0 = tl.load(at, mask=valid, other=0).to(tl.uint32, bitcast=True)
    key1 = tl.load(at + 1, mask=valid, other=0).to(tl.uint32, bitcast=True)
    return key0, key1


@triton.jit
def keep_signs(key0, key1, thresholds, module_key, first_feature, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int32 ``[ROWS, COLS]``: negative where an element is kept.

    Args:
        key0, key1: uint32 ``[ROWS]``.
        thresholds: uint32 ``[ROWS]``: 15-bit thresholds.
        module_key: int32, the bits of the module's key.
        first_feature: global index of the tile's first feature; even.

    Note: two multiplications and nine other integer operations for two elements.
    """
    index = (first_feature // 2 + tl.arange(0, COLS // 2)).to(tl.uint32)
    module = module_key.to(tl.uint32, bitcast=True)
    word = key0[:, None] + (index * _GOLDEN + module)[None, :]
    word = ((word ^ (word >> 16)) * _M1) ^ (key1 ^ (module * _M3))[:, None]
    word = (word ^ (word >> 15)) * _M2
    word = (word ^ (word >> 16)) & 0x7FFF7FFF
    word += ((0x8000 - thresholds) * 0x10001)[:, None]
    return tl.join(word << 16, word).to(tl.int32, bitcast=True).reshape(ROWS, COLS)


@triton.jit
def keep_where(signs, z):
    """``z`` where ``signs`` is negative, else 0.

    Note: 16-bit types go two to a register: a byte permutation spreads both sign bits and one AND masks both; a
    select per element takes twice as many instructions, and the passes over X are bound by these.
    """
    if NVIDIA and z.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m; prmt.b32 m, $2, $3, 0xFFBB; and.b32 $0, $1, m; }",
            "=r,r,r,r",
            [z, signs],
            dtype=z.dtype,
            is_pure=True,
            pack=2,
        )
    return tl.where(signs < 0, z, 0.0)


@triton.jit
def computed_once(z):
    """``z``, computed in one layout: what several products and stores need must not be computed for each of them.

    Note: Triton moves a change of layout in front of element-wise operations, which copies all of them, loads
    included, for every layout that a result is needed in.
    """
    if NVIDIA and z.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [z], dtype=z.dtype, is_pure=False, pack=2
        )  # fmt: skip
    return z
