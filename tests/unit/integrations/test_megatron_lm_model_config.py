"""A script's finished model is compared with the base model: what else it computes is refused by name."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.integrations.megatron_lm.model_config import ABSENT, check_model_config
from lorafusion_megatron.mcore.attention import PackedAttention
from lorafusion_megatron.mcore.build import BuildOptions, transformer_config
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.types import ModelSpec, Topology
from tests import tiny

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {},
    "llama 3.1": {"rope_scaling": LLAMA31, "rope_theta": 500000.0},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 4},
}
OTHERS = {
    "activation_func_clamp_value": 7.0,
    "apply_residual_connection_post_layernorm": True,
    "attention_output_gate": True,
    "enable_mhc_connections": True,
    "experimental_attention_variant": "dsa",
    "fp4": "e2m1",
    "fp8": "hybrid",
    "fp32_residual_connection": True,
    "glu_linear_offset": 1.0,
    "layernorm_zero_centered_gamma": True,
    "mlp_chunks_for_training": 2,
    "mtp_num_layers": 1,
    "multi_latent_attention": True,
    "no_rope_freq": [0, 1],
    "num_moe_experts": 4,
    "qk_l2_norm": True,
    "quant_recipe": object(),
    "rotary_interleaved": True,
    "softmax_type": "learnable",
    "use_mup": True,
    "use_transformer_engine_op_fuser": True,
    "window_size": (2, 0),
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 1,
    "kv_channels": 4,
    "layernorm_epsilon": 1e-3,
    "normalization": "LayerNorm",
    "qk_layernorm": True,
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "softmax_scale": 1.0,
    "cross_entropy_loss_fusion": True,
}
"""Field -> a value that no base model here has."""


def model(spec: ModelSpec, *, dtype: torch.dtype = torch.float32, positions: str = "rope", **rotary) -> SimpleNamespace:
    """What is looked at of a GPTModel that the package itself would build."""
    options = BuildOptions(
        dtype=dtype, device=torch.device("cpu"), layers_per_chunk=(spec.num_layers,), transformer_impl="local"
    )
    return SimpleNamespace(
        config=transformer_config(spec, Topology(), options),
        position_embedding_type=positions,
        rotary_pos_emb=SimpleNamespace(**rotary),
        parameters=lambda: iter([torch.zeros(1, dtype=dtype)]),
        modules=lambda: iter(()),
    )


@pytest.fixture
def llama(tmp_path) -> ModelSpec:
    return read_model_spec(tiny.write_base(tmp_path / "base"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_packages_own_configuration_passes(tmp_path, family):
    spec = read_model_spec(tiny.write_base(tmp_path / "base", **FAMILIES[family]))
    made = model(spec)
    check_model_config(made, spec)
    # What Megatron's own options add to all linears, or a bridge sets in so many words.
    made.config.add_bias_linear = made.config.add_qkv_bias = True
    made.config.softmax_scale = spec.head_dim**-0.5
    check_model_config(made, spec)


@pytest.mark.parametrize("name", OTHERS)
def test_a_field_that_changes_what_is_computed_is_named(llama, name):
    made = model(llama)
    setattr(made.config, name, OTHERS[name])
    with pytest.raises(UserError) as error:
        check_model_config(made, llama)
    assert error.value.key == f"TransformerConfig.{name}"


def test_every_field_is_megatrons_and_has_its_default_there(llama):
    defaults = {field.name: field.default for field in fields(TransformerConfig)}
    # A subclass of it has the first one, releases from 0.20 on the second.
    elsewhere = {"multi_latent_attention", "enable_mhc_connections"}
    assert {name: defaults.get(name, value) for name, value in ABSENT.items()} == ABSENT
    assert set(ABSENT) < set(OTHERS)
    assert set(OTHERS) - set(defaults) <= elsewhere


def test_a_window_passes_that_is_the_base_models(tmp_path, llama):
    mistral = read_model_spec(tiny.write_base(tmp_path / "mistral", model_type="mistral", sliding_window=64))
    made = model(mistral)
    made.config.window_size = [63, 0]  # as Megatron-Bridge sets it
    check_model_config(made, mistral)
    for window in ((64, 0), (63, 1), (-1, 0)):
        made.config.window_size = window
        with pytest.raises(UserError, match=r"^TransformerConfig\.window_size: .* is \("):
            check_model_config(made, mistral)
    made = model(llama)
    made.config.window_size = (63, 0)
    with pytest.raises(UserError, match=r"^TransformerConfig\.window_size: "):
        check_model_config(made, llama)


def test_megatrons_fused_loss_passes_in_16_bits(llama):
    made = model(llama, dtype=torch.bfloat16)
    made.config.cross_entropy_loss_fusion = True
    check_model_config(made, llama)


def test_positions_must_be_the_base_models(llama):
    check_model_config(model(llama, seq_len_interpolation_factor=None), llama)
    with pytest.raises(UserError, match=r"^GPTModel\.seq_len_interpolation_factor: .* is 4 in the model"):
        check_model_config(model(llama, seq_len_interpolation_factor=4), llama)
    for kind in ("none", "learned_absolute", "yarn"):
        with pytest.raises(UserError, match=rf"^GPTModel\.position_embedding_type: .* is {kind} in the model"):
            check_model_config(model(llama, positions=kind), llama)
    made = model(llama, positions="none")
    made.modules = lambda: iter([PackedAttention.__new__(PackedAttention)])
    check_model_config(made, llama)
