"""The kernels on a GPU: accuracy in every dtype, poisoned buffers, determinism, CUDA graphs, masks."""

import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

# The cases are shared with the tests under the interpreter.
sys.path.append(str(Path(__file__).parents[1] / "unit" / "kernels"))

from kernel_cases import TILE, as_dtype, masks_drawn, random_case, random_keys, run, worst_ratio
from mlp_cases import random_mlp, worst_mlp_ratio

from lorafusion_megatron.kernels import dropout, product_hopper
from lorafusion_megatron.kernels.tuning import GROUPS
from lorafusion_megatron.lora import triton_product
from lorafusion_megatron.lora.routing import RoutedSegment, build_routing
from lorafusion_megatron.lora.triton_backend import TritonBackend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTINGS = int(os.environ.get("LORAFUSION_GPU_ROUTINGS", "200"))
"""Random routings to try; ten thousand before a release."""
AT_ONCE = 50


@pytest.mark.parametrize("strategy", ["hopper", "fused", "expand"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_error_is_that_of_eager(seed, dtype, strategy):
    rng = random.Random(seed)
    case = random_case(
        seed,
        tokens=rng.choice([1, 63, 64, 700, 1031, 2048]),
        size=(rng.choice([64, 136, 1024]), rng.choice([72, 768, 1536])),
        slots=rng.choice([1, 4, 12]),
        dtype=dtype,
        device="cuda",
        projections=rng.choice([1, 3]),
        bias=rng.random() < 0.5,
        feature_offset=2 * rng.randint(0, 999),
        ranks=rng.choice([[16], [1, 3, 5], [8, 16, 64, 100, 256]]),
    )
    assert worst_ratio(TritonBackend(strategy=strategy), case) <= 1.5


@pytest.mark.parametrize("block", range(-(-ROUTINGS // AT_ONCE)))
def test_random_routings(block, monkeypatch):
    monkeypatch.setattr(triton_product, "GROUPS", (GROUPS[block % len(GROUPS)],))
    backends = {strategy: TritonBackend(strategy=strategy) for strategy in ("hopper", "fused", "expand")}
    for backend in backends.values():
        backend._product.tuner = None  # every size is new: measuring each would take longer than all the kernels
    for seed in range(block * AT_ONCE, min(ROUTINGS, (block + 1) * AT_ONCE)):
        rng = random.Random(1000 + seed)
        case = random_case(
            seed,
            tokens=rng.randint(1, 1500),
            size=(8 * rng.randint(2, 64), 8 * rng.randint(2, 64)),
            slots=rng.randint(1, 20),
            dtype=rng.choice(DTYPES),
            device="cuda",
            projections=rng.choice([1, 1, 2, 3]),
            bias=rng.random() < 0.3,
            feature_offset=2 * rng.randint(0, 99),
            ranks=rng.choice([[1, 2, 3], [8, 16], [5, 16, 40, 100]]),
        )
        assert worst_ratio(backends[rng.choice(list(backends))], case) <= 1.5, seed


def test_llama_shape():
    case = random_case(1, tokens=8192, size=(4096, 4096), slots=4, dtype=torch.bfloat16, device="cuda", ranks=[16])
    assert worst_ratio(TritonBackend(), case) <= 1.5


@pytest.mark.parametrize("size", [(28672, 1536), (1280, 28672), (8264, 11272)], ids=str)
def test_programs_kept_in_step(size, monkeypatch):
    """Inner sizes whose rows and columns the L2 does not hold, one of them no multiple of the places to wait at."""
    steps = launches_in_step(monkeypatch)
    case = random_case(2, tokens=3000, size=size, slots=3, dtype=torch.bfloat16, device="cuda", ranks=[16, 40])
    backend = TritonBackend(strategy="hopper")
    assert worst_ratio(backend, case) <= 1.5
    first, second = (run(backend, as_dtype(case, torch.bfloat16)) for _ in range(2))
    assert torch.equal(first.y, second.y)
    assert torch.equal(first.dx, second.dx)
    assert all(not counters.any() for counters in backend._device.counters.values())
    if torch.cuda.get_device_capability()[0] == 9:
        assert product_hopper.STEPS_APART in steps


def launches_in_step(monkeypatch) -> set[int]:
    """Every IN_STEP that the Hopper product is launched with from now on."""
    seen, launch = set(), product_hopper._launch

    def watched(grid, arguments, **constants):
        seen.add(constants["IN_STEP"])
        launch(grid, arguments, **constants)

    monkeypatch.setattr(product_hopper, "_launch", watched)
    return seen


def test_programs_that_have_no_multiprocessor_are_not_waited_for_without_end():
    """Another stream's kernel holds multiprocessors while the product begins; the counters end as they began."""
    case = random_case(4, tokens=3000, size=(8192, 2048), slots=2, dtype=torch.bfloat16, device="cuda", ranks=[16])
    backend = TritonBackend(strategy="hopper")
    want = run(backend, case)
    matrix, side = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            matrix @ matrix
    got = run(backend, case)
    torch.cuda.synchronize()
    assert torch.equal(got.y, want.y)
    assert torch.equal(got.dx, want.dx)
    assert all(not counters.any() for counters in backend._device.counters.values())


@pytest.mark.parametrize("strategy", ["hopper", "fused", "expand"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_what_follows_da_finds_dx_done(strategy, graph):
    """dA does not wait for the product and is done long before it here; a copy, a dependent launch and another stream
    that come after dA must see all of dx."""
    case = random_case(6, tokens=2048, size=(1024, 28672), slots=1, dtype=torch.bfloat16, device="cuda", ranks=[16])
    (slot,) = case.adapters.by_slot
    routing = build_routing(
        [RoutedSegment(slot=slot, start=2048 - TILE, stop=2048)],
        num_tokens=2048,
        tile=TILE,
        row_keys=case.routing.row_keys,
    )
    backend, side = TritonBackend(strategy=strategy), torch.cuda.Stream()
    _, s = backend.forward(case.x, case.weight, None, case.adapters, routing)
    want = backend.backward(case.dy, case.x, case.weight, s, case.adapters, routing, needs_dx=True).clone()
    want_s = backend.forward(want, case.weight, None, case.adapters, routing)[1].clone()
    torch.cuda.synchronize()

    def follow() -> list[torch.Tensor]:
        poison = torch.full_like(want, float("nan"))  # dx is likely to get this memory
        del poison
        dx = backend.backward(case.dy, case.x, case.weight, s, case.adapters, routing, needs_dx=True)
        again = backend.forward(dx, case.weight, None, case.adapters, routing)[1]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = dx.clone()
        copy = dx.clone()
        torch.cuda.current_stream().wait_stream(side)
        return [copy, beside, again]

    if graph:
        follow()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            results = follow()
        captured.replay()
    else:
        results = follow()
    torch.cuda.synchronize()
    assert torch.equal(results[0], want)
    assert torch.equal(results[1], want)
    assert torch.equal(results[2][-TILE:], want_s[-TILE:])


def test_nothing_unwritten_is_read():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # floats become NaN
    try:
        for seed in range(4):
            case = random_case(seed, tokens=999, size=(512, 640), slots=5, dtype=torch.bfloat16, device="cuda")
            assert worst_ratio(TritonBackend(strategy="fused"), case) <= 1.5
            assert worst_ratio(TritonBackend(strategy="expand"), case) <= 1.5
    finally:
        torch.use_deterministic_algorithms(False)


def test_repeats_to_the_last_bit():
    case = random_case(3, tokens=4096, size=(2048, 2048), slots=3, dtype=torch.bfloat16, device="cuda")
    results = [run(TritonBackend(), as_dtype(case, torch.bfloat16)) for _ in range(3)]
    for other in results[1:]:
        assert torch.equal(results[0].y, other.y)
        assert torch.equal(results[0].dx, other.dx)
        assert all(torch.equal(a, b) for a, b in zip(results[0].grads, other.grads, strict=True))


def test_cuda_graph():
    case = random_case(5, tokens=1024, size=(512, 768), slots=3, dtype=torch.bfloat16, device="cuda")
    backend = TritonBackend()

    def step():
        y, s = backend.forward(case.x, case.weight, None, case.adapters, case.routing)
        return y, backend.backward(case.dy, case.x, case.weight, s, case.adapters, case.routing, needs_dx=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        case.x.copy_(torch.randn_like(case.x))
        graph.replay()
        want = step()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_host_synchronisation():
    case = random_case(7, tokens=512, size=(512, 512), slots=3, dtype=torch.bfloat16, device="cuda")
    backend = TritonBackend()
    run(backend, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, s = backend.forward(case.x, case.weight, None, case.adapters, case.routing)
        backend.backward(case.dy, case.x, case.weight, s, case.adapters, case.routing, needs_dx=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("strategy", ["hopper", "fused", "expand"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_the_contract_bit_for_bit(dtype, strategy):
    keys = random_keys(64, 5, "cuda")
    want = dropout.keep_mask(keys, 0xDEADBEEF, 128, 0.3, feature_offset=384)
    backend = TritonBackend(strategy=strategy)
    drawn = masks_drawn(backend, keys, module_key=0xDEADBEEF, p=0.3, feature_offset=384, dtype=dtype)
    assert all(torch.equal(got, want) for got in drawn)


def test_running_beside_the_product_changes_nothing():
    case = random_case(9, tokens=4000, size=(1024, 2048), slots=3, dtype=torch.bfloat16, device="cuda")
    one, two = (
        run(TritonBackend(strategy="hopper", concurrent=c), as_dtype(case, torch.bfloat16)) for c in (True, False)
    )
    assert torch.equal(one.y, two.y)
    assert torch.equal(one.dx, two.dx)
    assert all(torch.equal(a, b) for a, b in zip(one.grads, two.grads, strict=True))


def test_one_backend_serves_any_alignment_and_any_adapters_in_turn():
    """Kernels are looked up by facts about their arguments: cases that differ in one fact each must not be mixed up."""
    backend = TritonBackend()
    for tokens, size, rank, offset, dtype in [
        (512, (512, 512), 16, 0, torch.bfloat16),
        (512, (512, 512), 16, 1, torch.bfloat16),
        (513, (512, 512), 16, 0, torch.bfloat16),
        (512, (520, 512), 16, 0, torch.bfloat16),
        (512, (512, 520), 16, 0, torch.bfloat16),
        (512, (512, 512), 5, 0, torch.bfloat16),
        (512, (512, 512), 16, 0, torch.float16),
        (512, (512, 512), 16, 0, torch.float32),
        (512, (512, 512), 16, 0, torch.bfloat16),
    ]:
        case = random_case(1, tokens=tokens, size=size, slots=3, dtype=dtype, device="cuda", ranks=[rank])
        if offset:
            shifted = torch.empty(case.x.numel() + offset, dtype=dtype, device="cuda")[offset:].view_as(case.x)
            case = replace(case, x=shifted.copy_(case.x))
        assert worst_ratio(backend, case) <= 1.5, (tokens, size, rank, offset, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_swiglu_mlp_has_the_error_of_eager(seed, dtype):
    rng = random.Random(seed)
    case = random_mlp(
        seed,
        tokens=rng.choice([700, 1031, 2600]),
        hidden=rng.choice([256, 384]),
        features=rng.choice([16 * 33, 768]),
        slots=rng.choice([3, 6]),
        dtype=dtype,
        device="cuda",
        ranks=rng.choice([[16], [3, 5], [8, 32]]),
    )
    backend = TritonBackend()
    if not backend.fuses_swiglu(case.fc1.adapters, case.fc2.adapters, case.fc1.routing):
        pytest.skip("no rows of an adapter on both linears")
    assert worst_mlp_ratio(backend, case) <= 1.5
