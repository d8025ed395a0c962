"""The Triton kernels under the interpreter against the PyTorch backend and fp64."""

import os
import random
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import TILE, Case, as_dtype, random_case, random_keys, relative, run, worst_ratio
from peft import LoraConfig, get_peft_model
from triton.runtime.errors import OutOfResources

from lorafusion_megatron.integrations.peft import fuse
from lorafusion_megatron.kernels import masks
from lorafusion_megatron.kernels.tuning import EXPAND, Tuner
from lorafusion_megatron.lora import triton_backend, triton_product
from lorafusion_megatron.lora.reference import TorchBackend
from lorafusion_megatron.lora.routing import RoutedSegment, build_routing
from lorafusion_megatron.lora.triton_backend import TritonBackend
from lorafusion_megatron.training.planning import TRITON_TILE

ROUTINGS = int(os.environ.get("LORAFUSION_ROUTINGS", "24"))
"""Random routings to try; a few hundred before a release, 24 in the suite (0.3 s each)."""


def test_interpreter_is_on():
    assert not masks.NVIDIA.value, "the kernels were imported before TRITON_INTERPRET was set"


def backend(strategy: str = "fused") -> TritonBackend:
    return TritonBackend("cpu", strategy=strategy, interpret=True)


@pytest.mark.parametrize("seed", range(ROUTINGS))
def test_random_routings(seed):
    rng = random.Random(seed)
    case = random_case(
        seed,
        tokens=rng.randint(1, 500),
        size=(8 * rng.randint(2, 24), 8 * rng.randint(2, 24)),
        slots=rng.randint(1, 7),
        dtype=rng.choice([torch.float32, torch.float16]),
        projections=rng.choice([1, 1, 2, 3]),
        bias=rng.random() < 0.3,
        feature_offset=2 * rng.randint(0, 99),
        ranks=rng.choice([[1, 2, 3], [8, 16], [5, 16, 40, 100]]),
    )
    assert worst_ratio(backend(rng.choice(["expand", "fused"])), case) <= 1.5


def test_bfloat16_runs():
    # The interpreter cuts floats down to bfloat16 where the GPU rounds, which doubles the error.
    case = random_case(3, tokens=150, size=(64, 96), slots=2, dtype=torch.bfloat16)
    assert worst_ratio(backend(), case) <= 3.0


@pytest.mark.parametrize("size", [(33, 48), (40, 31), (40, 1)], ids=["odd in", "odd out", "one output"])
def test_sizes_that_no_copy_engine_takes(size):
    case = random_case(5, tokens=130, size=size, slots=3, dtype=torch.float16)
    assert worst_ratio(backend(), case) <= 1.5


def test_widest_rank_and_many_slots():
    case = random_case(7, tokens=700, size=(48, 64), slots=9, ranks=[1, 7, 256])
    assert worst_ratio(backend(), case) <= 1.5


def test_split_features_sum_in_order(monkeypatch):
    # 4096 features over few tiles: several programs share a tile and the last to arrive sums their parts.
    case = random_case(9, tokens=64, size=(4096, 32), slots=1, ranks=[4])
    launched = []
    original = triton_backend.down

    def spy(*args, splits, **kwargs):
        launched.append(splits)
        return original(*args, splits=splits, **kwargs)

    monkeypatch.setattr(triton_backend, "down", spy)
    assert worst_ratio(backend(), case) <= 1.5
    assert max(launched) > 1


def segments_case(segments: list[RoutedSegment], tokens: int) -> Case:
    case = random_case(11, tokens=tokens, size=(64, 48), slots=4, ranks=[4, 20])
    routing = build_routing(segments, num_tokens=tokens, tile=TILE, row_keys=random_keys(tokens, 11))
    return Case(**{**vars(case), "routing": routing})


def test_no_adapter_is_concerned():
    case = segments_case([], 100)
    y, s = backend().forward(case.x, case.weight, case.bias, case.adapters, case.routing)
    assert s is None
    torch.testing.assert_close(y, case.x @ case.weight.t())
    result = run(backend(), case)
    torch.testing.assert_close(result.dx, case.dy @ case.weight)
    assert not any(grad.any() for grad in result.grads)


def test_unknown_slot_sees_the_frozen_base():
    known = next(iter(random_case(11, tokens=64, size=(64, 48), slots=4).adapters.by_slot))
    case = segments_case([RoutedSegment(slot=known, start=0, stop=64), RoutedSegment(slot=99, start=64, stop=150)], 150)
    result = run(backend(), case)
    torch.testing.assert_close(result.y[64:], (case.x @ case.weight.t())[64:])
    assert worst_ratio(backend(), case) <= 1.5


def test_replaced_adapter_is_noticed():
    mine = backend()
    case = random_case(13, tokens=128, size=(64, 48), slots=2, ranks=[4])
    run(mine, case)
    other = as_dtype(case, torch.float32)
    for slot, adapter in other.adapters.by_slot.items():
        adapter.a.add_(1.0)
        case.adapters.by_slot[slot] = adapter
    assert relative(run(mine, case).y, run(TorchBackend(), case).y) < 1e-5


def test_an_adapter_that_left_is_let_go_and_its_place_can_be_taken():
    mine = backend()
    case = random_case(13, tokens=128, size=(64, 48), slots=2, ranks=[4])
    run(mine, case)
    (slot, adapter) = case.adapters.by_slot.popitem()
    case.routing.derived.clear()
    gone = weakref.ref(adapter)
    other = replace(adapter, a=adapter.a + 1.0)
    del adapter
    assert gone() is None, "its flat buffers would stay as long as its linear runs no other adapter"
    routing = build_routing(
        [RoutedSegment(slot=slot + 1, start=0, stop=128)], num_tokens=128, tile=TILE, row_keys=random_keys(128, 13)
    )
    case.adapters.by_slot[slot + 1] = other
    case = replace(case, routing=routing)
    assert relative(run(mine, case).y, run(TorchBackend(), case).y) < 1e-5


def test_a_routing_that_stays_keeps_no_table_of_linears_that_went():
    mine = backend()
    case = random_case(13, tokens=128, size=(64, 48), slots=1, ranks=[4])
    (slot,) = case.adapters.by_slot
    segments = [RoutedSegment(slot=slot, start=0, stop=128)]
    routing = build_routing(segments, num_tokens=128, tile=TILE, row_keys=random_keys(128, 13))
    tables = []
    for _ in range(3):
        one = replace(case, adapters=replace(case.adapters, derived={}), routing=routing)
        run(mine, one)
        tables.append(weakref.ref(one.adapters.derived["triton"]))
    assert [table() is None for table in tables] == [True, True, False]


def test_linears_that_share_their_tables_and_a_routing_draw_their_own_masks():
    mine = backend()
    case = random_case(27, tokens=128, size=(64, 48), slots=1, ranks=[4])
    (slot,) = case.adapters.by_slot
    case.adapters.by_slot[slot] = replace(case.adapters.by_slot[slot], dropout=0.5)
    routing = build_routing(
        [RoutedSegment(slot=slot, start=0, stop=128)], num_tokens=128, tile=TILE, row_keys=random_keys(128, 27)
    )
    for module_key in (1, 2):
        one = replace(case, adapters=replace(case.adapters, module_key=module_key), routing=routing)
        assert worst_ratio(mine, one) <= 1.5


def test_a_peft_model_draws_new_masks_in_every_step():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 16)), config)
    assert fuse(model, backend=backend()).fused == 1
    x = torch.randn(8, 32)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)


def test_a_product_that_has_no_room_falls_back_to_expand(monkeypatch):
    def refuse(*_, **__):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton_product, "product", refuse)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    case = random_case(29, tokens=100, size=(64, 48), slots=2, dtype=torch.float16, ranks=[4])
    mine = backend("fused")
    mine._product.tuner = Tuner(None)
    assert worst_ratio(mine, case) <= 1.5
    assert {way.kind for way in mine._product.chosen.values()} == {EXPAND}


def test_rows_that_are_not_contiguous():
    case = random_case(15, tokens=130, size=(64, 48), slots=2)
    padded = torch.full((130, 80), float("nan"))
    padded[:, :64] = case.x
    columns = case.dy.t().contiguous().t()
    strided = Case(**{**vars(case), "x": padded[:, :64], "dy": columns})
    assert worst_ratio(backend(), strided) <= 1.5


def test_nothing_unwritten_is_read(monkeypatch):
    # Every uninitialised buffer holds NaN: a kernel that reads what nobody wrote shows.
    def poisoned(original):
        def make(*args, **kwargs):
            out = original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    case = random_case(17, tokens=333, size=(72, 88), slots=5, ranks=[1, 5, 20])
    assert worst_ratio(backend("fused"), case) <= 1.5
    assert worst_ratio(backend("expand"), case) <= 1.5


def test_repeats_to_the_last_bit():
    case = random_case(19, tokens=500, size=(64, 80), slots=2, ranks=[8])
    first, second = run(backend(), as_dtype(case, torch.float32)), run(backend(), as_dtype(case, torch.float32))
    assert torch.equal(first.y, second.y)
    assert torch.equal(first.dx, second.dx)
    assert all(torch.equal(a, b) for a, b in zip(first.grads, second.grads, strict=True))


def test_reasons():
    x, w = torch.zeros(4, 8), torch.zeros(8, 8)
    assert "need a GPU" in TritonBackend("cpu").reason_unsupported(x, w)
    assert "float64" in backend().reason_unsupported(x.double(), w.double())
    assert "one type" in backend().reason_unsupported(x, w.half())
    assert backend().reason_unsupported(x, w) is None
    second = SimpleNamespace(device=torch.device("cuda", 1))
    assert TritonBackend("cuda:0").reason_unsupported(second, second) == (
        "this backend is for cuda:0; the input is on cuda:1"
    )


def test_foreign_tile_is_refused():
    case = random_case(21, tokens=64, size=(16, 16), slots=1, ranks=[4])
    slot = next(iter(case.adapters.by_slot))
    routing = build_routing(
        [RoutedSegment(slot=slot, start=0, stop=64)], num_tokens=64, tile=16, row_keys=random_keys(64, 0)
    )
    with pytest.raises(ValueError, match="tiles of 16 rows; the Triton backend needs 64"):
        backend().forward(case.x, case.weight, None, case.adapters, routing)


def test_too_many_blocks_of_columns():
    case = random_case(23, tokens=64, size=(16, 18), slots=1, ranks=[1])
    slot, adapter = next(iter(case.adapters.by_slot.items()))
    case.adapters.by_slot[slot] = replace(
        adapter,
        a=torch.zeros(9, 16),
        b=torch.zeros(18, 9),
        grad_a=torch.zeros(9, 16),
        grad_b=torch.zeros(18, 9),
        projections=tuple(range(9)),
    )
    case = Case(
        **{
            **vars(case),
            "routing": build_routing(
                [RoutedSegment(slot=slot, start=0, stop=64)], num_tokens=64, tile=TILE, row_keys=random_keys(64, 0)
            ),
        }
    )
    with pytest.raises(ValueError, match="9 blocks of columns on one linear; the kernels know 8"):
        run(backend(), case)


def test_rows_that_start_off_a_copys_alignment():
    case = random_case(25, tokens=100, size=(64, 48), slots=2, dtype=torch.float16, ranks=[4])
    shifted = torch.empty(100 * 72 + 3, dtype=torch.float16)[3:].view(100, 72)[:, :64]
    shifted.copy_(case.x)
    assert shifted.data_ptr() % 16 != 0
    assert worst_ratio(backend(), Case(**{**vars(case), "x": shifted})) <= 1.5


def test_adapters_on_another_device_are_refused():
    case = random_case(3, tokens=70, size=(16, 24), slots=2)
    for slot, adapter in case.adapters.by_slot.items():
        case.adapters.by_slot[slot] = replace(adapter, a=adapter.a.to("meta"))
    routing = build_routing(
        [RoutedSegment(slot=next(iter(case.adapters.by_slot)), start=0, stop=70)],
        num_tokens=70,
        tile=64,
        row_keys=random_keys(70, 1),
    )
    with pytest.raises(ValueError, match="on meta, a backend for cpu"):
        backend().forward(case.x, case.weight, None, case.adapters, routing)


def test_the_plan_knows_the_tile_without_torch() -> None:
    assert triton_backend.TILE == TRITON_TILE == TILE
