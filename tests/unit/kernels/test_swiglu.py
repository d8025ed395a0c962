"""The SwiGLU MLP with adapters as one function, under the interpreter, against linear, activation, linear in fp64."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import TILE, random_keys
from mlp_cases import MlpCase, fused, random_mlp, worst_mlp_ratio
from torch.utils.checkpoint import checkpoint

from lorafusion_megatron.lora.routing import RoutedSegment, Routing, build_routing
from lorafusion_megatron.lora.swiglu_mlp import swiglu_mlp
from lorafusion_megatron.lora.triton_backend import TritonBackend
from lorafusion_megatron.lora.triton_slots import with_gaps


def backend() -> TritonBackend:
    return TritonBackend("cpu", strategy="fused", interpret=True)


def routed(case: MlpCase, routing: Routing) -> MlpCase:
    """The case under another routing."""
    return MlpCase(fc1=replace(case.fc1, routing=routing), fc2=replace(case.fc2, routing=routing))


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
    case = random_mlp(1, tokens=600, hidden=16, features=32, slots=3, dtype=torch.float32, ranks=[4])
    slot = next(iter(case.fc2.adapters.by_slot))
    case.fc1.adapters.by_slot = {slot: next(iter(case.fc1.adapters.by_slot.values()))}
    segments = [RoutedSegment(slot=slot, start=64, stop=600)]
    case = routed(case, build_routing(segments, num_tokens=600, tile=TILE, row_keys=random_keys(600, 1)))
    one, two = fused(backend(), case.to(torch.float32)), fused(backend(), case.to(torch.float32))
    cut = [split for key, (_, split) in _chunk_tables(case) if key[-1]]
    assert cut == [True]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert worst_mlp_ratio(backend(), case) <= 1.5


def _chunk_tables(case: MlpCase) -> list:
    derived = case.fc1.routing.derived
    return [(key, value) for key, value in derived.items() if isinstance(key, tuple) and key[0] == "chunks"]


def test_nothing_unwritten_is_read(monkeypatch):
    # Every uninitialised buffer holds NaN: a kernel that reads what nobody wrote shows.
    def poisoned(original):
        def make(*args, **kwargs):
            out = original(*args, **kwargs)
            return out.detach().fill_(float("nan")) if out.is_floating_point() else out

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    case = random_mlp(3, tokens=333, hidden=40, features=48, slots=5, dtype=torch.float32, ranks=[1, 5, 20])
    assert worst_mlp_ratio(backend(), case) <= 1.5


def test_adapters_on_one_of_the_linears_beside_some_on_both():
    case = random_mlp(7, tokens=256, hidden=32, features=64, slots=5, dtype=torch.float32, ranks=[4])
    fc1, fc2 = case.fc1.adapters.by_slot, case.fc2.adapters.by_slot
    both, first, second = 0, 1, 2
    pair, other = next(iter(fc1.values())), next(iter(fc2.values()))
    fc1.clear()
    fc2.clear()
    fc1.update({both: pair, first: replace(pair, grad_a=pair.grad_a.clone(), grad_b=pair.grad_b.clone())})
    fc2.update({both: other, second: replace(other, grad_a=other.grad_a.clone(), grad_b=other.grad_b.clone())})
    segments = [RoutedSegment(slot=slot, start=64 * slot, stop=64 * slot + 64) for slot in (both, first, second)]
    routing = build_routing(segments, num_tokens=256, tile=TILE, row_keys=random_keys(256, 7))
    case = routed(case, routing)
    assert worst_mlp_ratio(backend(), case) <= 1.5


def added_gradients(
    case: MlpCase, whole: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> list[torch.Tensor]:
    """What a backward through ``whole(x)`` adds to the gradients of a case's adapters."""
    adapters = [*case.fc1.adapters.by_slot.values(), *case.fc2.adapters.by_slot.values()]
    for adapter in adapters:
        adapter.grad_a.zero_()
        adapter.grad_b.zero_()
    whole(x).backward(case.fc2.dy)
    return [grad for adapter in adapters for grad in (adapter.grad_a, adapter.grad_b)]


@pytest.mark.parametrize("how", ["no gradient", "recomputed"])
def test_the_adapters_gradients_do_not_depend_on_the_inputs_or_on_recompute(how):
    case = random_mlp(9, tokens=150, hidden=32, features=64, slots=4, dtype=torch.float32, ranks=[4])
    _, _, *wanted = fused(backend(), case.to(torch.float32))
    mine = case.to(torch.float32)
    fc1, fc2 = mine.fc1, mine.fc2
    anchor = torch.empty(0, requires_grad=True)

    def whole(x):
        return swiglu_mlp(
            x, fc1.weight, fc2.weight, fc1.adapters, fc2.adapters, fc1.routing, backend=backend(), anchor=anchor
        )

    if how == "no gradient":
        got = added_gradients(mine, whole, fc1.x)
    else:
        got = added_gradients(mine, lambda x: checkpoint(whole, x, use_reentrant=True), fc1.x.requires_grad_())
    assert any(grad.any() for grad in got)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_and_inputs_whose_rows_are_not_contiguous():
    case = random_mlp(9, tokens=200, hidden=32, features=64, slots=4, dtype=torch.float32, ranks=[4])
    wanted = fused(backend(), case.to(torch.float32))
    strided = case.to(torch.float32)
    columns = strided.fc2.dy.t().contiguous().t()
    padded = torch.full((200, 48), float("nan"))
    padded[:, :32] = strided.fc1.x
    strided = MlpCase(fc1=replace(strided.fc1, x=padded[:, :32]), fc2=replace(strided.fc2, dy=columns))
    torch.testing.assert_close(fused(backend(), strided), wanted, rtol=1e-4, atol=1e-4)


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
