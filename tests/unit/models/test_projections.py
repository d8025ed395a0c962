"""Which rows of which projection a rank holds."""

from dataclasses import replace

import numpy as np
import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.projections import (
    Target,
    adapter_shapes,
    input_features,
    projection_names,
    resolve_targets,
    row_of_projection,
    row_projection,
    target_linears,
)
from lorafusion_megatron.types import ModelSpec

# 4 query heads in 2 groups of 3 features: q has 12 rows, k and v 6.
SPEC = ModelSpec(
    family="llama", num_layers=2, hidden_size=8, ffn_hidden_size=4, num_attention_heads=4, num_query_groups=2,
    head_dim=3, vocab_size=16, max_position_embeddings=32, norm_epsilon=1e-5, rope_theta=1e4,
)  # fmt: skip


def test_rows_of_the_fused_attention_linear_by_hand() -> None:
    assert row_projection(SPEC, "linear_qkv", 0, 1).tolist() == ([0] * 6 + [1] * 3 + [2] * 3) * 2
    assert row_of_projection(SPEC, "linear_qkv", 0, 1).tolist() == [
        *range(0, 6), *range(0, 3), *range(0, 3), *range(6, 12), *range(3, 6), *range(3, 6),
    ]  # fmt: skip
    assert row_projection(SPEC, "linear_qkv", 1, 2).tolist() == [0] * 6 + [1] * 3 + [2] * 3
    assert row_of_projection(SPEC, "linear_qkv", 1, 2).tolist() == [*range(6, 12), *range(3, 6), *range(3, 6)]


def test_rows_of_the_gated_linear_by_hand() -> None:
    assert row_projection(SPEC, "linear_fc1", 0, 1).tolist() == [0] * 4 + [1] * 4
    assert row_projection(SPEC, "linear_fc1", 1, 2).tolist() == [0, 0, 1, 1]
    assert row_of_projection(SPEC, "linear_fc1", 1, 2).tolist() == [2, 3, 2, 3]


@pytest.mark.parametrize(("linear", "features"), [("linear_proj", 12), ("linear_fc2", 4)])
def test_row_parallel_linears_hold_all_rows_and_a_share_of_the_input(linear: str, features: int) -> None:
    assert row_projection(SPEC, linear, 1, 2).tolist() == [0] * 8
    assert row_of_projection(SPEC, linear, 1, 2).tolist() == list(range(8))
    assert input_features(SPEC, linear, 1, 2) == slice(features // 2, features)
    assert input_features(SPEC, "linear_qkv", 1, 2) == slice(0, 8)


@pytest.mark.parametrize("linear", ["linear_qkv", "linear_fc1"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_shards_hold_every_row_of_every_projection_once(linear: str, tp_size: int) -> None:
    spec = replace(SPEC, num_attention_heads=8, num_query_groups=4, head_dim=5)
    rows = [
        pair
        for rank in range(tp_size)
        for pair in zip(
            row_projection(spec, linear, rank, tp_size), row_of_projection(spec, linear, rank, tp_size), strict=True
        )
    ]
    projections = target_linears(spec)[linear].projections
    assert sorted(rows) == [(i, row) for i, p in enumerate(projections) for row in range(p.out_features)]
    assert row_projection(spec, linear, 0, tp_size).dtype == np.int32
    assert row_of_projection(spec, linear, 0, tp_size).dtype == np.int32


def test_table_names_the_modules_of_both_worlds() -> None:
    linears = target_linears(SPEC)
    assert {name: [p.path for p in linear.projections] for name, linear in linears.items()} == {
        "linear_qkv": [f"model.layers.{{i}}.self_attn.{n}_proj" for n in "qkv"],
        "linear_proj": ["model.layers.{i}.self_attn.o_proj"],
        "linear_fc1": ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
        "linear_fc2": ["model.layers.{i}.mlp.down_proj"],
    }
    assert linears["linear_fc2"].path == "decoder.layers.{i}.mlp.linear_fc2"
    assert [linear.in_features for linear in linears.values()] == [8, 12, 8, 4]
    assert (
        linears["linear_qkv"].projections[2].tensor_name(7, "B")
        == "base_model.model.model.layers.7.self_attn.v_proj.lora_B.weight"
    )


def test_targets_are_exactly_those_that_were_named() -> None:
    assert resolve_targets(SPEC, ["v_proj", "q_proj", "linear_fc1"]) == {
        "linear_qkv": Target(projections=(0, 2), shared=False),
        "linear_fc1": Target(projections=(0, 1), shared=True),
    }
    assert projection_names(SPEC, ["v_proj", "q_proj", "linear_fc1"]) == ["q_proj", "v_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_prj"], "'q_prj' matches no linear of a layer"),
        (["lm_head"], "'lm_head' matches no linear of a layer"),
        (["embed_tokens"], "matches no linear"),
        (["q_proj", "linear_qkv"], "'linear_qkv' and 'q_proj' mean the same weights"),
        (["q_proj", "q_proj"], "mean the same weights"),
        ([], "no target module"),
    ],
)
def test_wrong_targets_list_what_could_match(targets: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_targets(SPEC, targets, key="jobs[0].peft.target_modules")
    assert words in str(caught.value)
    assert str(caught.value).startswith("jobs[0].peft.target_modules: ")
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in str(caught.value)
    assert "linear_qkv, linear_proj, linear_fc1, linear_fc2" in str(caught.value)


def test_adapter_shapes_cover_every_layer() -> None:
    assert adapter_shapes(SPEC, ["k_proj", "down_proj"], 5) == {
        f"base_model.model.model.layers.{i}.{module}.lora_{factor}.weight": shape
        for i in range(2)
        for module, factor, shape in (
            ("self_attn.k_proj", "A", (5, 8)),
            ("self_attn.k_proj", "B", (6, 5)),
            ("mlp.down_proj", "A", (5, 4)),
            ("mlp.down_proj", "B", (8, 5)),
        )
    }
