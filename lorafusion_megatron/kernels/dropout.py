"""Counter-based dropout masks: the same bits under any packing, rank layout, backend and recompute.

A token's row has a 64-bit key hashed from (job seed, optimizer step, sample, token position). A word of 32 bits is

    x = key0 + module_key + (feature // 2) * GOLDEN            (mod 2^32)
    x = (x ^ x >> 16) * M1 ^ key1 ^ module_key * M3;  x = (x ^ x >> 15) * M2;  x = x ^ x >> 16

and serves two features, the even one with bits 0 to 14, the odd one with bits 16 to 30: a feature is kept if its
15 bits are >= round(p * 32768).

Note: two multiplications for two elements, where Philox takes about twenty for four; drawing the mask must not
cost more than the pass over X that it rides on. The second key, mixed in half way, keeps rows whose first keys lie
near each other from being shifted copies of one sequence. Kept values are scaled by the inverse of the
probability that the threshold really gives, so the expectation is exact for every p. With 15 bits of a half one
addition to the whole word compares both: a half's top bit then says "keep".
"""

import torch

MASK32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
M1, M2, M3 = 0x7FEB352D, 0x846CA68B, 0xC2B2AE35
LEVELS = 1 << 15
"""Resolution of drop probabilities."""


def _mix(x: torch.Tensor, salt: torch.Tensor | int = 0) -> torch.Tensor:
    """32-bit finalizer on int64 tensors that hold values below 2^32."""
    x = ((x ^ (x >> 16)) * M1) & MASK32
    x = x ^ salt
    x = ((x ^ (x >> 15)) * M2) & MASK32
    return x ^ (x >> 16)


def row_keys(seed: torch.Tensor, step: torch.Tensor, sample: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Key of each token's row.

    Args:
        seed, step, sample, position: int64 ``[tokens]`` each; the seed's 64 bits count, the others' low 32.

    Returns:
        int32 ``[tokens, 2]`` (the bits of two uint32).
    """
    low, high = seed & MASK32, (seed >> 32) & MASK32
    keys = []
    for salt in (0x243F6A88, 0x85A308D3):
        x = _mix(low ^ salt, high)
        x = _mix((x + step * GOLDEN) & MASK32, low)
        x = _mix((x + sample * GOLDEN) & MASK32, high)
        keys.append(_mix((x + position * GOLDEN) & MASK32, salt))
    stacked = torch.stack(keys, dim=-1)
    return torch.where(stacked >= 1 << 31, stacked - (1 << 32), stacked).to(torch.int32)


def threshold(p: float) -> int:
    """The smallest 15-bit value that is kept under drop probability ``p``."""
    return min(LEVELS - 1, round(p * LEVELS))


def keep_scale(p: float) -> float:
    """Factor of kept values: one over the probability to be kept."""
    return LEVELS / (LEVELS - threshold(p))


def keep_mask(
    keys: torch.Tensor, module_key: int, num_features: int, p: float, *, feature_offset: int = 0
) -> torch.Tensor:
    """Which inputs of a linear are kept: the reference that every kernel matches bit for bit.

    Args:
        keys: int32 ``[tokens, 2]`` of `row_keys`.
        module_key: 32 bits that name the linear within the model.
        num_features: input features on this rank.
        p: probability to be dropped.
        feature_offset: index of this rank's first feature (row-parallel linears); even.

    Returns:
        bool ``[tokens, num_features]``.
    """
    if p == 0.0:
        return torch.ones(keys.shape[0], num_features, dtype=torch.bool, device=keys.device)
    wide = keys.to(torch.int64) & MASK32
    words = -(-num_features // 2)
    index = torch.arange(words, device=keys.device, dtype=torch.int64) + feature_offset // 2
    start = (wide[:, :1] + module_key + index * GOLDEN) & MASK32
    word = _mix(start, wide[:, 1:] ^ (module_key * M3 & MASK32))
    halves = torch.stack((word & (LEVELS - 1), (word >> 16) & (LEVELS - 1)), dim=-1).reshape(keys.shape[0], 2 * words)
    return halves[:, :num_features] >= threshold(p)
