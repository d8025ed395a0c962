"""Megatron's local layer spec (no Transformer Engine) for packed sequences: attention and norm of our own.

The stock local spec refuses packed input (DotProductAttention) and sequence parallel (WrappedTorchNorm).
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm in Megatron's signature; its weight says that it is sequence parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_parameter_device(config))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):
    """Causal core attention over packed sequences (``thd``): no token sees another sequence's.

    On CUDA one call of PyTorch's variable-length attention; on the CPU one scaled-dot-product attention a
    sequence, whose cost is quadratic in that sequence's length alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        assert config.context_parallel_size == 1
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attention of ``query`` ``[t, heads, d]`` to ``key``, ``value`` ``[t, groups, d]``.

        Returns:
            ``[t, heads, d]``, which Megatron's attention reshapes.

        Raises:
            ValueError: the input is not packed.
        """
        packed = packed_seq_params
        if packed is None or packed.qkv_format != "thd":
            raise ValueError("PackedAttention takes packed sequences: pass packed_seq_params with qkv_format='thd'")
        if query.is_cuda:
            from torch.nn.attention.varlen import varlen_attn

            groups = query.shape[1] // key.shape[1]
            return varlen_attn(
                query,
                key.repeat_interleave(groups, dim=1),
                value.repeat_interleave(groups, dim=1),
                packed.cu_seqlens_q,
                packed.cu_seqlens_kv,
                packed.max_seqlen_q,
                packed.max_seqlen_kv,
                scale=self.scale,
                window_size=(-1, 0),
            )
        borders = packed.cu_seqlens_q.tolist()
        return torch.cat([self._one(query[a:b], key[a:b], value[a:b]) for a, b in pairwise(borders)])

    def _one(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Holds no state."""
        return {}


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
