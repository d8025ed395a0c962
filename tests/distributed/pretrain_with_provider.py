"""A pretraining script of the other kind: with a model provider, whose model Megatron's `get_model` wraps."""

from typing import Any

from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

from lorafusion_megatron.integrations import megatron_lm as lorafusion


def model_provider(pre_process: bool = True, post_process: bool = True, **named: Any) -> GPTModel:
    """A plain GPTModel with a tied output layer."""
    args = get_args()
    config = core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=args.qk_layernorm),
        vocab_size=args.padded_vocab_size or args.vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        vp_stage=named.get("vp_stage"),
    )


def never(*_: Any, **__: Any) -> Any:
    """Data and forward step: a run of jobs has its own."""
    raise AssertionError("a run of jobs calls neither the script's data provider nor its forward step")


args = parse_and_validate_args(extra_args_provider=lorafusion.add_arguments)
lorafusion.enable(args)
pretrain(
    pretrain_cfg_container_from_args(args),
    never,
    ModelType.encoder_or_decoder,
    never,
    model_provider=model_provider,
)
