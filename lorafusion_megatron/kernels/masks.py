"""The dropout mask of `dropout.keep_mask`, drawn inside a kernel."""

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B9)
_M1 = tl.constexpr(0x7FEB352D)
_M2 = tl.constexpr(0x846CA68B)


@triton.jit
def load_keys(keys, rows, valid):
    """Both key words of the given rows, uint32."""
    at = keys + rows.to(tl.int64) * 2
    key0 = tl.load(at, mask=valid, other=0).to(tl.uint32, bitcast=True)
    key1 = tl.load(at + 1, mask=valid, other=0).to(tl.uint32, bitcast=True)
    return key0, key1


@triton.jit
def keep_tile(key0, key1, thresholds, module_key, first_feature, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which elements of a tile are kept: int1 ``[ROWS, COLS]``.

    Args:
        key0, key1: uint32 ``[ROWS]``.
        thresholds: uint32 ``[ROWS]``: 16-bit thresholds.
        module_key: int32, the bits of the module's key.
        first_feature: global index of the tile's first feature; even.

    Note: two multiplications and about nine other integer operations for two elements; the high half is compared
    in place, the low half shifted up, so that both compare against the same shifted threshold.
    """
    index = (first_feature // 2 + tl.arange(0, COLS // 2)).to(tl.uint32)
    word = key0[:, None] + (index * _GOLDEN + module_key.to(tl.uint32, bitcast=True))[None, :]
    word = ((word ^ (word >> 16)) * _M1) ^ key1[:, None]
    word = (word ^ (word >> 15)) * _M2
    word = word ^ (word >> 16)
    bound = (thresholds << 16)[:, None]
    # word >= threshold << 16 compares the high half: its low bits cannot turn an unequal high half round.
    return tl.join((word << 16) >= bound, word >= bound).reshape(ROWS, COLS)
