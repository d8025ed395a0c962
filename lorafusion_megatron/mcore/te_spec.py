"""Megatron's Transformer Engine layer spec with the norms on their own, so that linears can be taken over whole.

The stock spec fuses the norm into the linear behind it (``TELayerNormColumnParallelLinear``), which keeps the
normalised input to itself; a LoRA linear needs it. The separate norm writes that input once, which the fused module
saves for backward anyway.
"""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from .attention import PackedAttention


def te_block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The Transformer Engine spec for ``num_layers`` layers of this stage.

    Note: in fp32 the core attention is `PackedAttention`: Transformer Engine has no fp32 kernel, and its plain fallback
    pads every sequence to the longest.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    sub = layer.submodules
    sub.input_layernorm = sub.pre_mlp_layernorm = TENorm
    attention = sub.self_attention.submodules
    attention.linear_qkv = TEColumnParallelLinear
    _mlp_submodules(sub.mlp).linear_fc1 = TEColumnParallelLinear
    if config.params_dtype == torch.float32:
        attention.core_attention = PackedAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)


def _mlp_submodules(mlp: Any) -> Any:
    """Megatron 0.19 gives the MLP as a partial of its class, earlier versions as a ModuleSpec."""
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
