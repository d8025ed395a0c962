"""Core attention over packed sequences, with the rotary embedding where the layer spec leaves it to us."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from ..lora.routing import Routing


@dataclass
class RoutedPackedSeqParams(PackedSeqParams):
    """Megatron's packing parameters, which it hands to every block, with what our own modules read besides."""

    routing: Routing | None = None
    """The microbatch's adapter routing."""
    positions: torch.Tensor | None = None
    """int64 ``[tokens]``: each token's position in its sample."""
    borders: tuple[int, ...] = ()
    """``cu_seqlens`` on the host."""
    rotary: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Cosine and sine of every token's angles, made by the first layer that needs them; by identity of the table."""


class PackedAttention(MegatronModule):
    """Causal core attention over packed sequences (``thd``): no token sees another sequence's.

    With ``inverse_frequencies`` set it turns queries and keys first, by each token's own position: Megatron's plain
    rotary embedding asks the device for the sequences' lengths in every layer. In 16 bits on a GPU the attention is one
    call of PyTorch's variable-length attention; otherwise one scaled-dot-product attention a sequence, whose cost is
    quadratic in that sequence's length alone.
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
        self.inverse_frequencies: torch.Tensor | None = None
        """fp32 ``[head_dim / 2]``; None where queries and keys come turned."""

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
        if not isinstance(packed, RoutedPackedSeqParams) or packed.qkv_format != "thd":
            raise ValueError("PackedAttention takes packed sequences: pass RoutedPackedSeqParams with qkv_format='thd'")
        if self.inverse_frequencies is not None:
            cos, sin = _angles(packed, self.inverse_frequencies)
            turn = _turn_compiled() if query.is_cuda else _turn
            query, key = turn(query, cos, sin), turn(key, cos, sin)
        if query.is_cuda and query.element_size() == 2:
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(
                query,
                key,
                value,
                packed.cu_seqlens_q,
                packed.cu_seqlens_kv,
                packed.max_seqlen_q,
                packed.max_seqlen_kv,
                scale=self.scale,
                window_size=(-1, 0),
            )
        return torch.cat([self._one(query[a:b], key[a:b], value[a:b]) for a, b in pairwise(packed.borders)])

    def _one(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Holds no state."""
        return {}


def _angles(packed: RoutedPackedSeqParams, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 ``[t, 1, d / 2]`` each, made once a microbatch and stage."""
    assert packed.positions is not None
    if id(inverse) not in packed.rotary:
        angles = packed.positions.float()[:, None, None] * inverse.to(packed.positions.device)
        packed.rotary[id(inverse)] = angles.cos(), angles.sin()
    return packed.rotary[id(inverse)]


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[t, heads, d]``: the pairs (i, i + d/2) turned by each token's angles, in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@cache
def _turn_compiled() -> Callable[..., torch.Tensor]:
    """`_turn` fused into one kernel each way, for any number of tokens."""
    return torch.compile(_turn, dynamic=True)
