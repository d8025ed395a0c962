"""A frozen GPTModel from a Hugging Face model's dimensions, for this rank's pipeline stage and tensor shard."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from ..types import ModelSpec, Topology, padded
from .attention import PackedAttention
from .local_spec import local_block_spec
from .vocab_loss import fused_vocab_loss, vocab_loss


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a run file says about the model beside its dimensions."""

    dtype: torch.dtype
    device: torch.device
    layers_per_chunk: tuple[int, ...]
    """Layers of each pipeline chunk in the order of the data's way through the model: stage 0 .. S-1 of chunk 0,
    then of chunk 1, …"""
    transformer_impl: str
    """local | transformer_engine"""
    recompute_granularity: str | None = None
    """None | selective (core attention) | full (every layer)"""


def transformer_config(spec: ModelSpec, topology: Topology, options: BuildOptions) -> TransformerConfig:
    """Megatron's configuration of the base model.

    Note: ``variable_seq_lengths`` is refused with the default MoE dispatcher even for dense models, hence
    "alltoall". ``calculate_per_token_loss`` makes the schedule use the loss as it is given, without dividing by
    the number of microbatches. ``overlap_p2p_comm`` would ask for messages before they are needed: a GPU may have to
    be idle for a kernel to be loaded, and where two hosts each load one while their GPUs wait for what the other has
    not sent yet, both wait for ever (seen on two H100s). Without it Megatron's own communicator mixes up the messages
    of two stages, whose previous and next peers are the same rank; `p2p.PlannedCommunicator` does not.
    ``batch_p2p_sync`` would stop the host at every message; it guards against a race of PyTorch before 1.12.
    """
    on_gpu = options.device.type == "cuda"
    full = options.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        layernorm_epsilon=spec.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=spec.proj_bias or spec.mlp_bias,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        bf16=options.dtype == torch.bfloat16,
        fp16=options.dtype == torch.float16,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        tensor_model_parallel_size=topology.tensor_parallel,
        pipeline_model_parallel_size=topology.pipeline_parallel,
        virtual_pipeline_model_parallel_size=topology.virtual_pipeline,
        context_parallel_size=topology.context_parallel,
        sequence_parallel=topology.sequence_parallel,
        pipeline_model_parallel_layout=_layout(options.layers_per_chunk),
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        deallocate_pipeline_outputs=True,
        overlap_p2p_comm=False,
        batch_p2p_comm=True,
        batch_p2p_sync=False,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=on_gpu,
        apply_rope_fusion=options.transformer_impl == "transformer_engine",
        recompute_granularity=options.recompute_granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
    )


def build_chunks(spec: ModelSpec, topology: Topology, options: BuildOptions) -> list[GPTModel]:
    """This rank's model chunks (one without interleaving), frozen, weights not yet loaded.

    Note: a tied output layer is never built as tied: Megatron would synchronise its weight over the pipeline for a
    gradient that a frozen base doesn't have. On one stage the two share one tensor; elsewhere each is loaded.
    """
    config = transformer_config(spec, topology, options)
    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), topology.pipeline_parallel
    chunks = []
    for v in range(topology.virtual_pipeline or 1):
        vp_stage = v if topology.virtual_pipeline is not None else None
        index = v * stages + stage
        num_layers = options.layers_per_chunk[index]
        model = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(config, options.transformer_impl, num_layers),
            vocab_size=padded(spec.vocab_size, topology.tensor_parallel),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=index == 0,
            post_process=index == len(options.layers_per_chunk) - 1,
            share_embeddings_and_output_weights=False,
            position_embedding_type="none" if options.transformer_impl == "local" else "rope",
            rotary_base=spec.rope_theta,
            vp_stage=vp_stage,
        )
        prepare_base(model, spec)
        if model.post_process:
            model.compute_language_model_loss = _Loss(model, fused=options.transformer_impl == "transformer_engine")
        chunks.append(model.to(options.device).train())
    return chunks


def rotary_inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Inverse frequencies ``theta^(-2i/d)``, with Llama 3's scaling where the model has it.

    Returns:
        fp32 ``[head_dim / 2]``.

    Note: wavelengths above ``original / low_freq_factor`` are stretched by ``factor``, those below
    ``original / high_freq_factor`` are kept, and between the two the inverse frequency is interpolated linearly
    in ``original / wavelength``. Megatron has the same rule with three of its four numbers fixed.
    """
    index = torch.arange(0, spec.head_dim, 2, dtype=torch.float32)
    inverse = 1.0 / (spec.rope_theta ** (index / spec.head_dim))
    if spec.rope_scaling is None:
        return inverse
    scaling = spec.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / inverse)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inverse / scaling["factor"] + smooth * inverse


def canonical_parameters(chunks: Sequence[GPTModel]) -> dict[str, torch.Tensor]:
    """Name with the layer's global number from 0 -> this rank's parameter."""
    out: dict[str, torch.Tensor] = {}
    for model in chunks:
        numbers = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(model.decoder.layers)}
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = numbers[parts[2]]
            out[".".join(parts)] = parameter.data
    return out


def transformer_engine_missing() -> str | None:
    """Why Transformer Engine can't be used; None where it can."""
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE
    except ImportError as error:
        return f"Transformer Engine does not import ({error})"
    return None if HAVE_TE else "Transformer Engine is not installed"


def _block_spec(config: TransformerConfig, transformer_impl: str, num_layers: int) -> Any:
    if transformer_impl == "local":
        return local_block_spec(config, num_layers)
    from .te_spec import te_block_spec

    return te_block_spec(config, num_layers)


def _layout(layers_per_chunk: Sequence[int]) -> list[list[str]] | None:
    """Megatron's custom pipeline layout; None where there is but one chunk."""
    if len(layers_per_chunk) == 1:
        return None
    layout = [["decoder"] * layers for layers in layers_per_chunk]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def prepare_base(model: GPTModel, spec: ModelSpec) -> None:
    """Make a model chunk the frozen base of ``spec``: rotary table, biases, tied output, padded vocabulary.

    Its embedding passes a gradient on to the first block. Idempotence is the caller's: hooks are added at each call.
    """
    model.requires_grad_(False)
    _set_rotary(model, rotary_inverse_frequencies(spec))
    if model.pre_process:
        # Without this, full recompute would see no input that requires a gradient and drop the adapters' own.
        model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    _drop_absent_biases(model, spec)
    if not model.post_process:
        return
    if model.pre_process and spec.tied:
        model.output_layer.weight = model.embedding.word_embeddings.weight
    first = parallel_state.get_tensor_model_parallel_rank() * model.output_layer.output_size_per_partition
    real = spec.vocab_size - first
    if real < model.output_layer.output_size_per_partition:
        model.output_layer.register_forward_hook(_MaskPaddedVocabulary(max(0, real)))


def _drop_absent_biases(model: GPTModel, spec: ModelSpec) -> None:
    """Megatron has one switch for the biases of all linears; a model may have some of them only."""
    has_bias = {
        "linear_qkv": spec.qkv_bias,
        "linear_proj": spec.proj_bias,
        "linear_fc1": spec.mlp_bias,
        "linear_fc2": spec.mlp_bias,
    }
    for name, module in model.decoder.named_modules():
        linear = name.rsplit(".", 1)[-1]
        if linear in has_bias and not has_bias[linear] and getattr(module, "bias", None) is not None:
            module.bias = None


def _set_rotary(model: GPTModel, inverse: torch.Tensor) -> None:
    """Give the frequencies to whoever turns queries and keys: Megatron's rotary embedding or our attention."""
    if model.position_embedding_type == "rope":
        model.rotary_pos_emb.inv_freq = inverse.to(model.rotary_pos_emb.inv_freq.device)
        return
    inverse = inverse.to(next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, PackedAttention):
            module.inverse_frequencies = inverse


class _Loss:
    """In place of the model's loss: the same cross-entropy without a second copy of the logits."""

    def __init__(self, model: GPTModel, *, fused: bool) -> None:
        group = model.pg_collection.tp
        self._group = group if group.size() > 1 else None
        self._first = group.rank() * model.output_layer.output_size_per_partition
        self._loss: Callable[..., torch.Tensor] = fused_vocab_loss if fused else vocab_loss

    def __call__(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``labels`` ``[1, tokens]``, ``logits`` ``[tokens, 1, vocabulary]`` -> ``[1, tokens]``."""
        # Not logits[:, 0]: the gradient of a selection is a copy into zeros of the size of all logits.
        return self._loss(logits.view(-1, logits.shape[-1]), labels[0], first=self._first, group=self._group)[None]


class _MaskPaddedVocabulary:
    """Forward hook: logits of rows that only fill the vocabulary up to a multiple of TP can't be predicted."""

    def __init__(self, real: int) -> None:
        self.real = real

    def __call__(self, module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> Any:
        logits, bias = output
        padding = torch.arange(logits.shape[-1], device=logits.device) >= self.real
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias
