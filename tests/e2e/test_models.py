"""Features of base models and adapters, each against Transformers + PEFT training the same job alone."""

import pytest
import torch

from tests import launch, tiny
from tests.oracle.case import TOLERANCE, train_case

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama3 rope scaling": {"rope_scaling": LLAMA3, "head_dim": 16},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "attention bias alone": {"attention_bias": True},
    "mlp bias alone": {"mlp_bias": True},
    "head_dim not hidden over heads": {"head_dim": 16},
    "multi-head attention": {"num_key_value_heads": 4},
    "tied output": {"tie_word_embeddings": True},
}
TP2 = (2, "model.tensor_model_parallel_size=2")
PP2 = (2, "model.pipeline_model_parallel_size=2")


def _error(folder, *overrides: str, world: int = 1) -> float:
    case = train_case(folder)
    launch.train(case.run_file, *overrides, world=world)
    return case.error(folder / "out")


@pytest.mark.parametrize("topology", [TP2, PP2], ids=["TP2", "PP2"])
@pytest.mark.parametrize("model", MODELS)
def test_features_of_base_models_train_as_in_transformers(tmp_path, measured, model, topology):
    tiny.write_base(tmp_path / "base", **MODELS[model])
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "only", lengths={"prompt": (20, 60), "completion": (10, 40)})])
    world, override = topology
    assert measured(_error(tmp_path, override, world=world)) <= TOLERANCE


def test_llama3_scaling_matters_over_the_lengths_of_the_test_above(tmp_path):
    lengths = {"prompt": (60, 61), "completion": (40, 41)}
    first_losses = []
    for name, changes in (("plain", {"head_dim": 16}), ("scaled", MODELS["llama3 rope scaling"])):
        folder = tmp_path / name
        tiny.write_base(folder / "base", **changes)
        tiny.write_run(folder, [tiny.job(folder, "only", lengths=lengths, steps=2)])
        launch.train(folder / "run.yaml")
        first_losses.append(tiny.losses(folder / "out", "only")[0])
    plain, scaled = first_losses
    assert abs(plain - scaled) > TOLERANCE * plain


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_that_tensor_parallelism_does_not_divide_trains_as_in_transformers(tmp_path, measured, tied):
    tiny.write_base(tmp_path / "base", vocab_size=67, tie_word_embeddings=tied)
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "only")])
    override = TP2[1]
    assert measured(_error(tmp_path, override, "model.sequence_parallel=true", world=2)) <= TOLERANCE


@pytest.mark.parametrize(("world", "override"), [(1, "runtime.seed=5"), TP2, PP2], ids=["one process", "TP2", "PP2"])
def test_megatron_names_share_one_a_over_a_fused_linear(tmp_path, measured, world, override):
    tiny.write_base(tmp_path / "base")
    targets = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    mixed = ["linear_qkv", "up_proj"]
    tiny.write_run(
        tmp_path,
        [
            tiny.job(tmp_path, "fused", target_modules=targets, seed=1),
            tiny.job(tmp_path, "mixed", r=2, target_modules=mixed, seed=2),
        ],
    )
    assert measured(_error(tmp_path, override, world=world)) <= TOLERANCE
    exported = tiny.adapter(tmp_path / "out", "fused")
    for layer in range(4):
        prefix = f"base_model.model.model.layers.{layer}"
        q, k, v = (exported[f"{prefix}.self_attn.{name}_proj.lora_A.weight"] for name in "qkv")
        gate, up = (exported[f"{prefix}.mlp.{name}_proj.lora_A.weight"] for name in ("gate", "up"))
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        assert torch.equal(gate, up)
    assert len(exported) == 4 * 7 * 2
    assert len(tiny.adapter(tmp_path / "out", "mixed")) == 4 * 4 * 2


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_the_scale_is_alpha_over_r_or_over_its_root(tmp_path, measured, use_rslora):
    """Rows 14 and 15: alpha differs from r, and PEFT's own scale is the reference."""
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "only", r=16, alpha=32.0, use_rslora=use_rslora)])
    assert measured(_error(tmp_path, *TP2[1:], world=2)) <= TOLERANCE


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_ranks_that_tensor_parallelism_does_not_divide_train_as_in_peft(tmp_path, measured, rank):
    """Row 12: TP splits features, never the rank."""
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "only", r=rank, alpha=24.0)])
    assert measured(_error(tmp_path, TP2[1], "model.sequence_parallel=true", world=2)) <= TOLERANCE


@pytest.mark.parametrize("layers", [[0], [3], [0, 2]], ids=str)
def test_a_stage_without_adapters_trains_as_in_peft(tmp_path, measured, layers):
    """Row 3: one of the two stages has no parameter to step, and joins every collective all the same."""
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "only", layers_to_transform=layers)])
    assert measured(_error(tmp_path, PP2[1], world=2)) <= TOLERANCE
    numbers = {int(name.split(".layers.")[1].split(".")[0]) for name in tiny.adapter(tmp_path / "out", "only")}
    assert numbers == set(layers)
