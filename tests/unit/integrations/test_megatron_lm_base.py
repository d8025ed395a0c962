"""What a script's own model makes of the run that was prepared for it."""

from types import SimpleNamespace

import pytest

from lorafusion_megatron.config import load_run
from lorafusion_megatron.integrations.megatron_lm.base import with_layers_of
from lorafusion_megatron.scheduler.cost import split_loads
from lorafusion_megatron.training.setup import Prepared, prepare
from tests import tiny


@pytest.fixture
def prepared(tmp_path, monkeypatch) -> Prepared:
    """A run of four layers on two stages, each of two chunks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    layout = ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"]
    return prepare(load_run(tiny.tiny_run(tmp_path), layout))


def with_chunks(prepared: Prepared, stages: list[list[int]]) -> Prepared:
    """The run when the chunks of each stage have so many layers; this rank is stage 0."""
    models = [SimpleNamespace(decoder=SimpleNamespace(layers=range(count))) for count in stages[0]]
    groups = SimpleNamespace(
        pp_rank=0,
        pp_size=len(stages),
        gather=lambda mine: [mine, *enumerate(stages)][1:],
        broadcast=lambda value: value,
    )
    return with_layers_of(prepared, models, groups)


def test_windows_are_balanced_for_the_layers_that_the_chunks_have(prepared):
    assert prepared.plan_options.loads == split_loads(prepared.layers_per_chunk)
    got = with_chunks(prepared, [[0, 1], [1, 2]])
    assert got.layers_per_chunk == (0, 1, 1, 2)
    assert got.plan_options.loads == split_loads((0, 1, 1, 2))
    assert got.plan_options.cost_model == prepared.plan_options.cost_model
    assert prepared.layers_per_chunk != (0, 1, 1, 2)


def test_layers_of_a_hybrid_model_are_half_a_layer_each(prepared):
    got = with_chunks(prepared, [[1, 3], [2, 2]])
    assert got.layers_per_chunk == (1, 2, 3, 2)
    assert [load.layers for load in got.plan_options.loads] == [0.5, 1.0, 1.5, 1.0]
    assert [load.output for load in got.plan_options.loads] == [0.0, 0.0, 0.0, 1.0]
