"""Models that are built by hand in the ranks of a test, as a bridge would build them, and trained on."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from lorafusion_megatron.config import load_run
from lorafusion_megatron.integrations import megatron_bridge
from lorafusion_megatron.mcore import parallel
from lorafusion_megatron.mcore.local_spec import RMSNorm, local_block_spec
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.load import load_base_weights
from lorafusion_megatron.types import ModelSpec


def train_built_models(kind: str, words: list[str]) -> int:
    """Build a model of a kind from the base model of a run, load its weights, and train the jobs on it."""
    run = load_run(words[0], words[1:])
    spec = read_model_spec(run.base_model.path)
    layout = {"pipeline_model_parallel_size": run.model.pipeline_model_parallel_size}
    groups = parallel.start(
        run.topology(layout["pipeline_model_parallel_size"]), device="cpu", seed=1, timeout_minutes=1.0
    )
    model = {"hybrid": _hybrid, "gpt": _gpt, "stock attention": _stock, "clamped": _clamped}[kind](spec, layout)
    _load(model, str(run.base_model.path), spec, hybrid=kind == "hybrid")
    try:
        return 0 if megatron_bridge.train_models([_Wrapper(model)], run) else 75
    finally:
        assert groups.pp_size == layout["pipeline_model_parallel_size"]
        parallel.stop()


class _Wrapper(torch.nn.Module):
    """What a mixed-precision or DDP wrapper looks like from outside."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.config = module, module.config

    def set_input_tensor(self, tensor: Any) -> None:
        """Megatron's schedules hand a stage its input."""
        self.module.set_input_tensor(tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _config(spec: ModelSpec, layout: dict[str, int], num_layers: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        layernorm_epsilon=spec.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **layout,
    )


def _ends() -> dict[str, bool]:
    return {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }


def _gpt(spec: ModelSpec, layout: dict[str, int]) -> GPTModel:
    config = _config(spec, layout, spec.num_layers)
    layers = local_block_spec(config, spec.num_layers // layout["pipeline_model_parallel_size"])
    return _gpt_model(spec, config, layers)


def _clamped(spec: ModelSpec, layout: dict[str, int]) -> GPTModel:
    model = _gpt(spec, layout)
    model.config.activation_func_clamp_value = 7.0
    return model


def _stock(spec: ModelSpec, layout: dict[str, int]) -> GPTModel:
    config = _config(spec, layout, spec.num_layers)
    return _gpt_model(spec, config, get_gpt_layer_local_spec(normalization="RMSNorm"))


def _gpt_model(spec: ModelSpec, config: TransformerConfig, layers: Any) -> GPTModel:
    return GPTModel(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=spec.vocab_size,
        max_sequence_length=spec.max_position_embeddings,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        **_ends(),
    )


def _hybrid(spec: ModelSpec, layout: dict[str, int]) -> HybridModel:
    """Attention and MLP as layers of their own, cut into stages by bars in the pattern."""
    stages = layout["pipeline_model_parallel_size"]
    hybrid_block.TENorm = RMSNorm  # the final norm, which the stack names itself
    layer = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    attention = local_block_spec(_config(spec, layout, 1), 1).layer_specs[0].submodules.self_attention
    stack = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=RMSNorm, self_attention=attention, self_attn_bda=get_bias_dropout_add
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=RMSNorm, mlp=layer.mlp, mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )
    return HybridModel(
        config=_config(spec, layout, 2 * spec.num_layers),
        hybrid_stack_spec=stack,
        vocab_size=spec.vocab_size,
        max_sequence_length=spec.max_position_embeddings,
        hybrid_layer_pattern="|".join(["*-" * (spec.num_layers // stages)] * stages),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        **_ends(),
    )


def _load(model: Any, path: str, spec: ModelSpec, *, hybrid: bool) -> None:
    """Fill a model with the base model's weights under Hugging Face's layer numbers."""
    parameters = {}
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    for name, parameter in model.named_parameters():
        parts = name.replace("final_norm", "final_layernorm").split(".")
        if parts[:2] == ["decoder", "layers"]:
            number = numbers[int(parts[2])]
            parts[2] = str(number // 2 if hybrid else number)
        parameters[".".join(parts)] = parameter.data
    load_base_weights(path, spec, parameters, tp_rank=0, tp_size=1)
