"""Which Hugging Face tensors make up each Megatron parameter, one table per model family.

A family is a `Family` entry in `FAMILIES`: what its ``config.json`` switches on, the defaults of keys that the file may
leave out, and its table of parameters. Knows no torch: validation and planning read it too.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.types import ModelSpec


class Split(Enum):
    """How tensor parallelism shards a parameter."""

    REPLICATED = "replicated"
    ROWS = "rows"
    """Column-parallel linears: dimension 0, every source by itself."""
    COLUMNS = "columns"
    """Row-parallel linears: dimension 1."""
    VOCABULARY = "vocabulary"
    """Dimension 0 of a table whose rows may be padded up."""


class Sliding(Enum):
    """How a family's ``config.json`` speaks of sliding-window attention."""

    NEVER = "never"
    ALWAYS = "always"
    """All layers use ``sliding_window``, null for none."""
    BY_LAYER = "by_layer"
    """``use_sliding_window`` switches it on from layer ``max_window_layers`` on, or as ``layer_types`` says."""


@dataclass(frozen=True, slots=True)
class Source:
    """A Hugging Face tensor; ``{i}`` in its name is the layer, its shape is in the words of `dimension`."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A Megatron parameter: its sources below each other, in one piece or interleaved by query group."""

    name: str
    """Canonical name; ``{i}`` is the global layer number from 0."""
    sources: tuple[Source, ...]
    split: Split = Split.REPLICATED
    by_query_group: bool = False
    """Whether rows run [sources of group 0, sources of group 1, ..] and not [source 0, source 1, ..]."""
    switch: str | None = None
    """Boolean field of `ModelSpec` without which the parameter doesn't exist."""
    alias: str | None = None
    """Name inside Transformer Engine's fused modules."""

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{i}" in self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family."""

    architecture: str
    """The one entry of ``architectures`` that is supported."""
    parameters: tuple[Parameter, ...]
    switches: Mapping[str, str | bool] = field(default_factory=dict)
    """Boolean field of `ModelSpec` -> key of ``config.json`` (absent: false), or a constant."""
    defaults: Mapping[str, int | None] = field(default_factory=dict)
    """Values that Transformers takes for keys that ``config.json`` leaves out; None: derived from other keys."""
    sliding: Sliding = Sliding.NEVER


def _linear(
    name: str, *sources: tuple[str, str, str], split: Split, bias: str, by_query_group: bool = False
) -> tuple[Parameter, ...]:
    """Weight and bias of a linear from (projection, rows, columns); the bias of a row-parallel one is replicated."""
    return (
        Parameter(
            name=f"{name}.weight",
            sources=tuple(Source(f"{path}.weight", (rows, columns)) for path, rows, columns in sources),
            split=split,
            by_query_group=by_query_group,
        ),
        Parameter(
            name=f"{name}.bias",
            sources=tuple(Source(f"{path}.bias", (rows,)) for path, rows, _ in sources),
            split=split if split is Split.ROWS else Split.REPLICATED,
            by_query_group=by_query_group,
            switch=bias,
        ),
    )


_MEGATRON = "decoder.layers.{i}"
_HF = "model.layers.{i}"

# Pre-norm decoder with grouped-query attention and a gated MLP, as Llama names it.
DECODER = (
    Parameter(
        name="embedding.word_embeddings.weight",
        sources=(Source("model.embed_tokens.weight", ("vocab", "hidden")),),
        split=Split.VOCABULARY,
    ),
    Parameter(
        name=f"{_MEGATRON}.input_layernorm.weight",
        sources=(Source(f"{_HF}.input_layernorm.weight", ("hidden",)),),
        alias=f"{_MEGATRON}.self_attention.linear_qkv.layer_norm_weight",
    ),
    *_linear(
        f"{_MEGATRON}.self_attention.linear_qkv",
        (f"{_HF}.self_attn.q_proj", "query", "hidden"),
        (f"{_HF}.self_attn.k_proj", "key", "hidden"),
        (f"{_HF}.self_attn.v_proj", "key", "hidden"),
        split=Split.ROWS,
        bias="qkv_bias",
        by_query_group=True,
    ),
    *_linear(
        f"{_MEGATRON}.self_attention.linear_proj",
        (f"{_HF}.self_attn.o_proj", "hidden", "query"),
        split=Split.COLUMNS,
        bias="proj_bias",
    ),
    Parameter(
        name=f"{_MEGATRON}.pre_mlp_layernorm.weight",
        sources=(Source(f"{_HF}.post_attention_layernorm.weight", ("hidden",)),),
        alias=f"{_MEGATRON}.mlp.linear_fc1.layer_norm_weight",
    ),
    *_linear(
        f"{_MEGATRON}.mlp.linear_fc1",
        (f"{_HF}.mlp.gate_proj", "ffn", "hidden"),
        (f"{_HF}.mlp.up_proj", "ffn", "hidden"),
        split=Split.ROWS,
        bias="mlp_bias",
    ),
    *_linear(
        f"{_MEGATRON}.mlp.linear_fc2",
        (f"{_HF}.mlp.down_proj", "hidden", "ffn"),
        split=Split.COLUMNS,
        bias="mlp_bias",
    ),
    Parameter(name="decoder.final_layernorm.weight", sources=(Source("model.norm.weight", ("hidden",)),)),
    Parameter(
        name="output_layer.weight",
        sources=(Source("lm_head.weight", ("vocab", "hidden")),),
        split=Split.VOCABULARY,
    ),
)

# Norms over each head of q and k before the rotary embedding.
QK_NORM = tuple(
    Parameter(
        name=f"{_MEGATRON}.self_attention.{letter}_layernorm.weight",
        sources=(Source(f"{_HF}.self_attn.{letter}_norm.weight", ("head",)),),
        switch="qk_norm",
    )
    for letter in "qk"
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        parameters=DECODER,
        switches={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={"max_position_embeddings": 2048},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        parameters=DECODER,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 4096 * 32},
        sliding=Sliding.ALWAYS,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        parameters=DECODER,
        switches={"qkv_bias": True},
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768},
        sliding=Sliding.BY_LAYER,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        parameters=DECODER + QK_NORM,
        switches={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "qk_norm": True},
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
        },
        sliding=Sliding.BY_LAYER,
    ),
}

TIED_OUTPUT = "output_layer.weight"
TIED_SOURCE = "embedding.word_embeddings.weight"


def dimension(spec: ModelSpec, word: str) -> int:
    """Size of a dimension: hidden, head, query, key, ffn or vocab."""
    return {
        "hidden": spec.hidden_size,
        "head": spec.head_dim,
        "query": spec.num_attention_heads * spec.head_dim,
        "key": spec.num_query_groups * spec.head_dim,
        "ffn": spec.ffn_hidden_size,
        "vocab": spec.vocab_size,
    }[word]


def source_tensors(spec: ModelSpec, parameter: Parameter, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the Hugging Face tensors that make up one parameter of one layer."""
    for source in parameter.sources:
        yield source.name.format(i=layer), tuple(dimension(spec, word) for word in source.shape)


def model_parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """The rows of the family's table that this model has; a tied output layer is not one of its own."""
    return tuple(
        parameter
        for parameter in FAMILIES[spec.family].parameters
        if (parameter.switch is None or getattr(spec, parameter.switch))
        and not (spec.tied and parameter.name == TIED_OUTPUT)
    )


def find_parameter(spec: ModelSpec, name: str) -> tuple[Parameter, int]:
    """The table row of a canonical or Transformer Engine name, and its layer (0 outside of the layers).

    A tied ``output_layer.weight`` is the embedding's row.

    Raises:
        ValueError: this model has no such parameter.
    """
    wanted = TIED_SOURCE if spec.tied and name == TIED_OUTPUT else name
    number = re.search(r"(?<=\.layers\.)\d+(?=\.)", wanted)
    layer = int(number.group()) if number else 0
    template = wanted if number is None else wanted[: number.start()] + "{i}" + wanted[number.end() :]
    for parameter in model_parameters(spec):
        if template in (parameter.name, parameter.alias) and layer < spec.num_layers:
            return parameter, layer
    raise ValueError(f"a {spec.family} model of {spec.num_layers} layers has no parameter {name!r}")


def hf_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a checkpoint of this model must hold."""
    for parameter in model_parameters(spec):
        for layer in range(spec.num_layers if parameter.per_layer else 1):
            yield from source_tensors(spec, parameter, layer)


def check_tensor_parallel(spec: ModelSpec, tp_size: int, *, key: str = "model.tensor_model_parallel_size") -> None:
    """Check that the heads and the MLP can be dealt out evenly to ``tp_size`` ranks.

    Raises:
        UserError: they can't.
    """
    for what, number in (
        ("attention heads", spec.num_attention_heads),
        ("key/value heads", spec.num_query_groups),
        ("MLP features", spec.ffn_hidden_size),
    ):
        if number % tp_size:
            raise UserError(
                f"{tp_size} tensor-parallel ranks for {number} {what}",
                rule=f"each rank takes equally many {what}",
                remedy=f"use a divisor of {number}",
                key=key,
            )
    if tp_size > 1 and spec.ffn_hidden_size // tp_size % 2:
        raise UserError(
            f"{tp_size} tensor-parallel ranks for {spec.ffn_hidden_size} MLP features",
            rule="each rank takes an even number of them, since one random word makes the dropout of two",
            remedy="use fewer ranks",
            key=key,
        )
