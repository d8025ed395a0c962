"""Megatron's local layer spec (no Transformer Engine) for packed sequences: attention and norm of our own.

The stock local spec refuses packed input (DotProductAttention) and sequence parallel (WrappedTorchNorm).
"""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from .attention import PackedAttention


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm (one kernel each way on a GPU) in Megatron's signature; says where it is sequence parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_parameter_device(config))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def local_block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The local spec for ``num_layers`` layers of this stage, with packed attention and RMSNorm.

    The final norm is named too: where only a layer's spec is given, Megatron takes its own, which refuses
    sequence parallel.
    """
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    sub = layer.submodules
    sub.input_layernorm = sub.pre_mlp_layernorm = RMSNorm
    attention = sub.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _parameter_device(config: TransformerConfig) -> torch.device | None:
    return None if config.use_cpu_initialization else torch.device(torch.cuda.current_device())
