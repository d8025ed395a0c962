"""Whether a finished model computes what the base model's checkpoint says, whoever built it from whatever."""

from collections.abc import Iterator
from typing import Any

import torch

from ...errors import UserError
from ...mcore.attention import PackedAttention
from ...types import ModelSpec
from .model_options import FUSED_LOSS

ABSENT = {
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "enable_mhc_connections": False,
    "experimental_attention_variant": None,
    "fp4": None,
    "fp8": None,
    "fp32_residual_connection": False,
    "glu_linear_offset": 0.0,
    "layernorm_zero_centered_gamma": False,
    "mlp_chunks_for_training": 1,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "num_moe_experts": None,
    "qk_l2_norm": False,
    "quant_recipe": None,
    "rotary_interleaved": False,
    "softmax_type": "vanilla",
    "use_mup": False,
    "use_transformer_engine_op_fuser": False,
}
"""Fields of Megatron's configuration that no supported base model sets -> their defaults.

Each changes what is computed, or takes rows or linears away from the adapters. A field that a release lacks has none.
"""


def check_model_config(model: Any, spec: ModelSpec) -> None:
    """Compare a model with the base model.

    Args:
        model: a chunk (GPTModel or HybridModel) in its final type, before its rotary table and its biases are set from
            ``spec``.
        spec: the base model.

    Raises:
        UserError: a field of its configuration, or its rotary embedding, differs; the message names it.

    Note: what `build.prepare_base` sets from the base model is not looked at: rope scaling, the rotary base, biases
    that one switch of Megatron's adds to all linears, a tied output layer.
    """
    # A hybrid model counts attention and MLP as layers of their own.
    hybrid = getattr(model, "hybrid_layer_pattern", None) is not None
    for name, wanted in _fields(spec):
        if hybrid and name == "num_layers":
            continue
        got = getattr(model.config, name, wanted)
        if got != wanted:
            raise _differs(f"{name} is {_named(got)}", f"set it to {_named(wanted)} where the model is built", name)
    scale = model.config.softmax_scale
    if scale is not None and abs(scale * spec.head_dim**0.5 - 1) > 1e-6:
        raise _differs(f"softmax_scale is {scale}", "leave it out where the model is built", "softmax_scale")
    if model.config.cross_entropy_loss_fusion and next(model.parameters()).dtype == torch.float32:
        raise UserError(
            "got True in an fp32 run",
            rule=FUSED_LOSS,
            remedy="switch it off where the model is built, or train in bfloat16",
            key="TransformerConfig.cross_entropy_loss_fusion",
        )
    _check_window(model.config, spec)
    _check_positions(model)


def _fields(spec: ModelSpec) -> Iterator[tuple[str, Any]]:
    """Every field that the base model settles, with its value."""
    yield from (
        ("num_layers", spec.num_layers),
        ("hidden_size", spec.hidden_size),
        ("ffn_hidden_size", spec.ffn_hidden_size),
        ("num_attention_heads", spec.num_attention_heads),
        ("num_query_groups", spec.num_query_groups),
        ("kv_channels", spec.head_dim),
        ("layernorm_epsilon", spec.norm_epsilon),
        ("normalization", "RMSNorm"),
        ("qk_layernorm", spec.qk_norm),
        ("gated_linear_unit", True),
        ("activation_func", torch.nn.functional.silu),
        ("hidden_dropout", 0.0),
        ("attention_dropout", 0.0),
    )
    yield from ABSENT.items()


def _check_window(config: Any, spec: ModelSpec) -> None:
    """No window, or the base model's, which no sample is longer than (`training.checks`): it hides nothing.

    Megatron's ``(left, right)`` are positions beside a token's own; Transformers counts that one.
    """
    window, wanted = config.window_size, spec.sliding_window
    if window is not None and (wanted is None or tuple(window) != (wanted - 1, 0)):
        name, remedy = "window_size", "leave it out where the model is built"
        raise _differs(f"{name} is {tuple(window)}", remedy, name)


def _check_positions(model: Any) -> None:
    """The positions are the base model's: rotary, in Megatron's embedding or in our attention, and not interpolated."""
    kind = model.position_embedding_type
    ours = kind == "none" and any(isinstance(module, PackedAttention) for module in model.modules())
    if kind != "rope" and not ours:
        remedy = "set it to rope where the model is built"
        raise _differs(f"position_embedding_type is {kind}", remedy, "position_embedding_type", owner="GPTModel")
    factor = getattr(getattr(model, "rotary_pos_emb", None), "seq_len_interpolation_factor", None)
    if factor not in (None, 1):
        name, remedy = "seq_len_interpolation_factor", "leave it out where the model is built"
        raise _differs(f"{name} is {factor}", remedy, name, owner="GPTModel")


def _named(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def _differs(given: str, remedy: str, name: str, *, owner: str = "TransformerConfig") -> UserError:
    return UserError(
        f"{given} in the model",
        rule="the base model needs another value",
        remedy=remedy,
        key=f"{owner}.{name}",
    )
