"""Predicted memory: every part counted by hand on a small model, and the whole against a measured run."""

from dataclasses import replace

import pytest

from lorafusion_megatron.lora.triton_backend import WIDEST_JOINT
from lorafusion_megatron.training.bench.workloads import shape
from lorafusion_megatron.training.memory import ADAPTER_BYTES, WIDEST_FUSED, MemoryOptions, describe, predict_memory
from lorafusion_megatron.types import AdapterSpec

TINY = shape("tiny", None)
ADAPTER = AdapterSpec(
    name="a", rank=8, alpha=16.0, target_modules=("q_proj", "down_proj"), seed=0, layers_to_transform=None
)
OPTIONS = MemoryOptions(layers_per_chunk=(2, 2), stages=2, token_capacity=100)


def test_weights_are_those_of_the_layers_and_tables_of_each_stage():
    first, last = predict_memory(TINY, [], OPTIONS)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 160 + 2 * 64
    assert first.weights == last.weights == 2 * (2 * layer + 512 * 64)
    one = predict_memory(replace(TINY, tied=True), [], replace(OPTIONS, layers_per_chunk=(4,), stages=1))
    assert one[0].weights == 2 * (4 * layer + 512 * 64)


def test_adapters_keep_a_master_a_gradient_and_two_moments_beside_what_the_linears_read():
    first, _ = predict_memory(TINY, [ADAPTER, ADAPTER], OPTIONS)
    q_and_down = 8 * (64 + 128) + 8 * (160 + 64)  # B of q spans the fused linear's 128 rows
    assert first.adapters == 2 * 2 * q_and_down * (ADAPTER_BYTES + 2)


def test_a_checkpoint_on_its_way_takes_copies_of_masters_and_moments():
    plain, _ = predict_memory(TINY, [ADAPTER], OPTIONS)
    saving, _ = predict_memory(TINY, [ADAPTER], replace(OPTIONS, checkpoints=True))
    assert plain.snapshot == 0
    assert saving.snapshot == plain.adapters // (ADAPTER_BYTES + 2) * 12
    assert saving.total - plain.total == saving.snapshot
    assert "snapshot 0.00" in describe([saving])


def test_adapters_on_some_layers_take_room_where_these_are():
    everywhere, _ = predict_memory(TINY, [ADAPTER], OPTIONS)
    first, last = predict_memory(TINY, [replace(ADAPTER, layers_to_transform=(1,))], OPTIONS)
    assert (first.adapters, last.adapters) == (everywhere.adapters // 2, 0)


def test_tensor_parallelism_keeps_one_factor_whole():
    adapter = replace(ADAPTER, target_modules=("q_proj",))
    first, _ = predict_memory(TINY, [adapter], replace(OPTIONS, tensor_parallel=2))
    assert first.adapters == 2 * 8 * (64 + 128 // 2) * (ADAPTER_BYTES + 2)


def test_stages_hold_as_many_microbatches_as_stand_behind_them():
    four = replace(OPTIONS, layers_per_chunk=(1, 1, 1, 1), stages=4)
    per_stage = [part.activations for part in predict_memory(TINY, [], four)]
    assert [size / per_stage[-1] for size in per_stage] == [4, 3, 2, 1]
    assert [bool(part.logits) for part in predict_memory(TINY, [], four)] == [False, False, False, True]


def test_full_recompute_keeps_the_layers_inputs_alone():
    plain, full = (predict_memory(TINY, [], replace(OPTIONS, recompute=how))[1] for how in (None, "full"))
    assert full.activations == 100 * 2 * 64 * 2
    assert full.activations < plain.activations / 10
    assert full.transient > plain.transient


def test_the_prediction_for_a_measured_run_is_within_a_tenth():
    """Llama 8B cut to 16 layers, 4 adapters of rank 16, capacity 6,144, one H100, 25 November 2026: 25.97 GiB."""
    adapters = [replace(ADAPTER, rank=16, target_modules=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))] * 4
    options = MemoryOptions(layers_per_chunk=(16,), stages=1, token_capacity=6144)
    (stage,) = predict_memory(shape("llama-3.1-8b", 16), adapters, options)
    assert stage.total / 2**30 == pytest.approx(25.97, rel=0.1)


def test_the_line_says_predicted_and_measured():
    text = describe(predict_memory(TINY, [ADAPTER], OPTIONS), {0: 3 << 30})
    assert text.splitlines()[0].startswith("stage 0: 0.59 GiB predicted (weights 0.00, adapters")
    assert text.splitlines()[0].endswith("3.00 GiB measured")
    assert "measured" not in text.splitlines()[1]


def test_the_parts_of_the_line_add_up():
    for line in describe(predict_memory(shape("llama-3.1-8b", 16), [ADAPTER], OPTIONS)).splitlines():
        total, parts = line.split(" GiB predicted (")
        sizes = [float(part.split()[-1]) for part in parts.rstrip(")").split(", ")]
        assert float(total.split()[-1]) == pytest.approx(sum(sizes), abs=0.005 * (len(sizes) + 1))


def test_an_activation_that_is_made_again_is_not_kept():
    kept = predict_memory(TINY, [], OPTIONS)[0].activations
    made_again = predict_memory(TINY, [], replace(OPTIONS, fused_mlp=True))[0].activations
    in_flight = OPTIONS.stages
    layers = OPTIONS.layers_per_chunk[0]
    width = OPTIONS.token_capacity * TINY.ffn_hidden_size * OPTIONS.dtype_bytes // OPTIONS.tensor_parallel
    assert kept - made_again == in_flight * layers * width


BOTH = replace(ADAPTER, target_modules=("gate_proj", "up_proj", "down_proj"))


@pytest.mark.parametrize(
    ("adapters", "fused"),
    [
        ([BOTH, BOTH], True),
        ([BOTH, ADAPTER], False),
        ([replace(BOTH, rank=32)], True),
        ([replace(BOTH, rank=33)], False),
        ([replace(BOTH, rank=64, target_modules=("linear_fc1", "linear_fc2"))], True),
        ([replace(BOTH, layers_to_transform=(0, 2))], False),
    ],
    ids=["all", "one linear alone", "64 columns", "66 columns", "one A", "some layers"],
)
def test_the_activation_is_kept_where_some_microbatch_or_layer_keeps_it(adapters, fused):
    kept, asked = (predict_memory(TINY, adapters, replace(OPTIONS, fused_mlp=on))[0] for on in (False, True))
    assert (asked.activations < kept.activations) == fused


def test_the_widest_adapter_of_a_fused_mlp_is_the_backends():
    assert WIDEST_FUSED == WIDEST_JOINT


def test_a_bias_keeps_the_activation():
    spec = replace(TINY, mlp_bias=True)
    kept, asked = (predict_memory(spec, [BOTH], replace(OPTIONS, fused_mlp=on))[0] for on in (False, True))
    assert asked.activations == kept.activations
