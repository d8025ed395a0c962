"""The SwiGLU MLP with adapters as one function, under the interpreter, against linear, activation, linear in fp64."""

import random

import pytest
import torch
from kernel_cases import TILE, random_keys
from mlp_cases import fused, random_mlp, worst_mlp_ratio

from lorafusion_megatron.lora.routing import RoutedSegment, build_routing
from lorafusion_megatron.lora.triton_backend import TritonBackend
from lorafusion_megatron.lora.triton_slots import with_gaps


def backend() -> TritonBackend:
    return TritonBackend("cpu", strategy="fused", interpret=True)


@pytest.mark.parametrize("seed", range(12))
def test_random_mlps(seed):
    rng = random.Random(seed)
    # On a few numbers eager's fp16 errors can cancel by luck.
    dtype, least = rng.choice([(torch.float32, 1), (torch.float16, 200)])
    case = random_mlp(
        seed,
        tokens=rng.randint(least, 400),
        hidden=8 * rng.randint(2 if least == 1 else 6, 12),
        features=16 * rng.randint(1, 9),
        slots=rng.randint(2, 6),
        dtype=dtype,
        ranks=rng.choice([[1, 2, 3], [8, 16], [5, 16, 32]]),
    )
    one = backend()
    if not one.fuses_swiglu(case.fc1.adapters, case.fc2.adapters, case.fc1.routing):
        pytest.skip("no rows of an adapter on both linears")
    assert worst_mlp_ratio(one, case) <= 1.5


def test_long_segments_are_cut_and_repeat_to_the_last_bit():
    case = random_mlp(1, tokens=2600, hidden=32, features=64, slots=3, dtype=torch.float32, ranks=[4])
    assert max(segment.stop - segment.start for segment in case.fc1.routing.segments) > 1024
    assert worst_mlp_ratio(backend(), case) <= 1.5
    one, two = fused(backend(), case.to(torch.float32)), fused(backend(), case.to(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_it_leaves_to_the_base_class():
    case = random_mlp(5, tokens=200, hidden=32, features=64, slots=3, dtype=torch.float32)
    fc1, fc2 = case.fc1.adapters, case.fc2.adapters
    plain = build_routing([], num_tokens=200, tile=TILE, row_keys=random_keys(200, 1))
    assert not backend().fuses_swiglu(fc1, fc2, plain)
    slot = next(iter(fc1.by_slot))
    alone = build_routing(
        [RoutedSegment(slot=slot, start=0, stop=64)], num_tokens=200, tile=TILE, row_keys=random_keys(200, 1)
    )
    fc2.by_slot.pop(slot, None)
    assert not backend().fuses_swiglu(fc1, fc2, alone)
    wide = random_mlp(6, tokens=200, hidden=32, features=64, slots=3, dtype=torch.float32, ranks=[65])
    assert not backend().fuses_swiglu(wide.fc1.adapters, wide.fc2.adapters, wide.fc1.routing)


def test_every_row_is_in_one_chunk():
    assert with_gaps([(5, 64, 128), (2, 128, 192), (1, 256, 300)], 300) == [
        (-1, 0, 64), (5, 64, 128), (2, 128, 192), (-1, 192, 256), (1, 256, 300),
    ]  # fmt: skip
    assert with_gaps([], 10) == [(-1, 0, 10)]
    assert with_gaps([(0, 0, 10)], 10) == [(0, 0, 10)]
