"""``config.json`` in both spellings, and everything that is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.checkpoint import checkpoint_files
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.types import ModelSpec
from tests.unit.models.conftest import FAMILIES, SaveModel, biases

OLD_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec_of(folder: Path, config: dict[str, Any]) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    return read_model_spec(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_reads_as_what_it_builds(save_model: SaveModel, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_model(family, rope_theta=12345.0, rms_norm_eps=3e-5, tie_word_embeddings=True, **biases(family))
    spec, model = read_model_spec(folder), AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0]
    assert (spec.family, spec.num_layers, spec.tied) == (family, 3, True)
    assert (spec.vocab_size, spec.hidden_size) == tuple(model.lm_head.weight.shape)
    assert spec.ffn_hidden_size == layer.mlp.up_proj.out_features
    assert spec.num_attention_heads * spec.head_dim == layer.self_attn.q_proj.out_features
    assert spec.num_query_groups * spec.head_dim == layer.self_attn.k_proj.out_features
    assert spec.head_dim == layer.self_attn.head_dim
    assert spec.norm_epsilon == layer.input_layernorm.variance_epsilon == 3e-5
    assert spec.rope_theta == model.config.rope_parameters["rope_theta"] == 12345.0
    assert spec.qkv_bias == (layer.self_attn.k_proj.bias is not None)
    assert spec.proj_bias == (layer.self_attn.o_proj.bias is not None)
    assert spec.mlp_bias == (layer.mlp.down_proj.bias is not None)
    assert spec.qk_norm == hasattr(layer.self_attn, "q_norm")
    assert spec.sliding_window == (4096 if family == "mistral" else None)
    assert spec.rope_scaling is None


def test_older_keys_and_defaults(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, OLD_LLAMA)
    assert spec == ModelSpec(
        family="llama", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=4,
        head_dim=16, vocab_size=128, max_position_embeddings=2048, norm_epsilon=1e-5, rope_theta=500000.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ],
)
def test_llama3_scaling_in_every_spelling(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = {key: value for key, value in OLD_LLAMA.items() if key != "rope_theta"}
    spec = spec_of(tmp_path, config | rope)
    assert (spec.rope_theta, spec.rope_scaling) == (5e5, LLAMA3)


@pytest.mark.parametrize(
    ("family", "config", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 7}, 7),
        ("qwen2", {"sliding_window": 7}, None),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, 7),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 4096),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
        ("llama", {"sliding_window": 7}, None),
    ],
)
def test_sliding_windows(tmp_path: Path, family: str, config: dict[str, Any], window: int | None) -> None:
    base = {"num_key_value_heads": 2} | OLD_LLAMA | {"model_type": family}
    base.pop("architectures")
    assert spec_of(tmp_path, base | config).sliding_window == window


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for family in FAMILIES:
        config = {k: v for k, v in OLD_LLAMA.items() if k != "architectures"} | {"model_type": family}
        config["num_attention_heads"] = 32
        spec, reference = spec_of(tmp_path, config), AutoConfig.from_pretrained(tmp_path)
        assert spec.num_query_groups == reference.num_key_value_heads
        assert spec.max_position_embeddings == reference.max_position_embeddings
        head_dim = getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
        assert (spec.head_dim, spec.norm_epsilon) == (head_dim, reference.rms_norm_eps)
        assert spec.sliding_window == getattr(reference, "sliding_window", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3'; Llama, Mistral, Qwen2"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM is the one that is supported"),
        ({"num_local_experts": 8}, "mixtures of experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'; rotary embeddings of type default"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": "yarn"}, "rope parameters are 'yarn'"),
        ({"rope_theta": "large"}, "rope_theta is 'large'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "4 attention heads over 3 key/value heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_what_is_not_supported_is_one_line_that_says_so(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        spec_of(tmp_path, OLD_LLAMA | change)
    message = str(caught.value)
    assert words in message
    assert message.startswith("base_model.path: ")
    assert "config.json" in message
    assert "\n" not in message


@pytest.mark.parametrize("layers", [{"max_window_layers": 1}, {"layer_types": ["sliding_attention"]}])
def test_layers_that_mix_kinds_of_attention_are_refused(tmp_path: Path, layers: dict[str, Any]) -> None:
    config = {key: value for key, value in OLD_LLAMA.items() if key != "architectures"}
    config |= {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True} | layers
    with pytest.raises(UserError, match="not all layers use the same kind of attention"):
        spec_of(tmp_path, config)


def test_missing_files(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(UserError) as caught:
            read_model_spec(tmp_path / "base")
        return str(caught.value)

    base = tmp_path / "base"
    assert "is not a directory" in message()
    base.mkdir()
    assert "config.json does not exist" in message()
    (base / "config.json").write_text("{")
    assert "config.json can't be read" in message()
    (base / "config.json").write_text("[]")
    assert "config.json holds a list" in message()
    (base / "config.json").write_text(json.dumps(OLD_LLAMA))
    assert "holds no model.safetensors" in message()
    (base / "pytorch_model.bin").touch()
    assert "but pytorch_model.bin" in message()
    index = base / "model.safetensors.index.json"
    for content in ({}, {"weight_map": {}}, {"weight_map": {"a": "../b"}}, {"weight_map": {"a": ["b"]}}):
        index.write_text(json.dumps(content))
        assert "no usable weight_map" in message()
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    (base / "1.safetensors").touch()
    assert "lacks 2.safetensors (1 of 2 files)" in message()
    index.write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    assert "(1 of 1 files)" in message(), "a name that no file can have"


def test_a_single_file_goes_before_an_index_as_in_transformers(save_model: SaveModel) -> None:
    from transformers import AutoModelForCausalLM

    base = save_model("llama", max_shard_size="50KB")
    (base / "model.safetensors.index.json").rename(base / "kept")
    other = save_model("llama", name="other")
    save_file({k: v + 1 for k, v in load_file(other / "model.safetensors").items()}, base / "model.safetensors")
    (base / "kept").rename(base / "model.safetensors.index.json")
    assert len(list(base.glob("*.safetensors"))) > 2
    assert checkpoint_files(base) == (base / "model.safetensors",)
    loaded = AutoModelForCausalLM.from_pretrained(base).model.norm.weight
    assert torch.equal(loaded, load_file(base / "model.safetensors")["model.norm.weight"])


def test_reading_needs_no_torch() -> None:
    program = (
        "import lorafusion_megatron.models.config, lorafusion_megatron.models.projections,"
        " lorafusion_megatron.models.adapter_config, lorafusion_megatron.training.initial,"
        " lorafusion_megatron.models.checkpoint, sys; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
