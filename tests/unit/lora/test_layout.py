"""Factors between flat buffers and files: what `layout` says against the projections' own rows."""

from dataclasses import replace

import pytest
import torch

from lorafusion_megatron.lora.adapters import ALL_ROWS
from lorafusion_megatron.lora.bank import AdapterShard
from lorafusion_megatron.lora.layout import LinearLayout, TargetLinear
from lorafusion_megatron.mcore.gather import assemble
from lorafusion_megatron.mcore.inject import _target
from lorafusion_megatron.models.projections import target_linears
from lorafusion_megatron.scheduler.options import REFERENCE_MODEL
from lorafusion_megatron.training.setup import linear_layouts
from lorafusion_megatron.types import AdapterSpec

MODEL = replace(
    REFERENCE_MODEL,
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=20,
    num_attention_heads=12,
    num_query_groups=4,
    head_dim=6,
)
"""Three heads a group: q's rows lie in runs of 18 between those of k and v."""
COLUMN = ("linear_qkv", "linear_fc1")


def targets(tp_rank: int, tp_size: int) -> list[TargetLinear]:
    made = []
    for layer in range(MODEL.num_layers):
        for name, layout in linear_layouts(MODEL, tp_rank, tp_size).items():
            linear, column = target_linears(MODEL)[name], name in COLUMN
            full = sum(projection.out_features for projection in linear.projections)
            rows, columns = (full // tp_size, linear.in_features) if column else (full, linear.in_features // tp_size)
            module = torch.nn.Linear(columns, rows, bias=False)
            part = "self_attention" if name in ("linear_qkv", "linear_proj") else "mlp"
            made.append(_target(module, f"decoder.layers.{layer}.{part}.{name}", layout, column, tp_rank, tp_size))
    return made


def shards(modules: tuple[str, ...], tp_size: int) -> list[AdapterShard]:
    spec = AdapterSpec(name="a", rank=3, alpha=4.0, seed=5, target_modules=modules)
    return [AdapterShard(spec, targets(rank, tp_size), dtype=torch.bfloat16) for rank in range(tp_size)]


MODULES = [
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
    ("v_proj", "up_proj"),
]


@pytest.mark.parametrize("modules", MODULES, ids=lambda names: names[0])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_whole_factors_come_back_from_any_split(modules, tp_size):
    generator = torch.Generator().manual_seed(0)
    ranks = shards(modules, tp_size)
    shapes = {place.key: place.full_shape for place in ranks[0].places}
    whole = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for shard in ranks:
        shard.load(whole)
        assert torch.equal(shard.params, shard.master.bfloat16())
    found = assemble((shard.places, shard.master) for shard in ranks)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize("modules", MODULES, ids=lambda names: names[0])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_linear_computes_with_the_rows_that_its_projections_have_in_the_model(modules, tp_size):
    """B of each local row, as a linear reads it, is the row of its projection that the layout's tensors name."""
    for shard in shards(modules, tp_size):
        whole = {place.key: torch.randn(place.full_shape) for place in shard.places}
        shard.load(whole, shard.master)
        shard.refresh()
        for target, adapter in shard._linears:
            of_row, index, offset = (
                target.layout.row_projection,
                target.layout.row_index,
                target.adapters.feature_offset,
            )
            for k, projection in enumerate(adapter.projections):
                name = target.linear if projection == ALL_ROWS else target.layout.projections[projection]
                columns = slice(3 * k, 3 * k + 3)
                a, b = whole[target.layer, name, "A"], whole[target.layer, name, "B"]
                here = a[:, offset : offset + target.adapters.in_features]
                assert torch.equal(adapter.a[columns], here.bfloat16())
                for row in range(target.adapters.out_features):
                    own = int(of_row[row])
                    if projection not in (ALL_ROWS, own):
                        assert not adapter.b[row, columns].any()
                        continue
                    start = sum(target.layout.projection_rows[:own]) if projection == ALL_ROWS else 0
                    assert torch.equal(adapter.b[row, columns], b[start + int(index[row])].bfloat16())


def test_a_is_drawn_from_the_whole_matrix_whatever_the_split():
    whole = assemble((shard.places, shard.master) for shard in shards(MODULES[0], 1))
    split = assemble((shard.places, shard.master) for shard in shards(MODULES[0], 4))
    assert all(torch.equal(split[key], whole[key]) for key in whole)
    assert all(bool(factor.any()) == (key[2] == "A") for key, factor in whole.items())


def test_rows_that_no_rank_holds_are_said():
    first, _ = shards(("q_proj",), 2)
    with pytest.raises(ValueError, match=r"layer 0 q_proj B: 36 of 72 rows came from no rank"):
        assemble([(first.places, first.master)])


def test_neighbouring_rows_are_one_run():
    layout = LinearLayout(
        projections=("q", "k"),
        projection_rows=(8, 2),
        row_projection=torch.tensor([0, 0, 1, 0, 0]),
        row_index=torch.tensor([0, 1, 1, 4, 5]),
    )
    assert layout.runs == {0: ((0, 0, 2), (3, 4, 2)), 1: ((2, 1, 1),), ALL_ROWS: ((0, 0, 2), (2, 9, 1), (3, 4, 2))}
