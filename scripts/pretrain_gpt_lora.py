"""A Megatron-LM pretraining script (release 0.19) that trains many LoRA jobs where it is given a run file.

It is `scripts/examples/pretrain_gpt.py` and the three lines that name lorafusion:

    torchrun --nproc-per-node 2 scripts/pretrain_gpt_lora.py OPTIONS OF THE MODEL --lorafusion-config RUN.yaml

Without ``--lorafusion-config`` it pretrains as that script does.
"""

from argparse import ArgumentParser
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from lorafusion_megatron.integrations import megatron_lm as lorafusion

KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def extra_args(parser: ArgumentParser) -> ArgumentParser:
    """Arguments of this script's own."""
    group = parser.add_argument_group(title="this script")
    group.add_argument("--report-perplexity", action="store_true", help="Log exp(loss) too.")
    lorafusion.add_arguments(parser)
    return parser


def get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    """One microbatch on the stages that need it."""
    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(KEYS)
    rows = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        rows = next(data_iterator)
        rows = {key: rows[key].cuda(non_blocking=True) if rows.get(key) is not None else None for key in KEYS}
    return get_batch_on_this_tp_rank(
        rows,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum of the masked losses, the number of tokens, and both for the log."""
    mask = loss_mask.view(-1).float()
    loss, tokens = (losses.view(-1).float() * mask).sum(), mask.sum().to(torch.int)
    report = {"lm loss": torch.stack((loss.detach(), tokens.float()))}
    if get_args().report_perplexity:
        report["perplexity"] = (loss.detach() / tokens).exp().view(1)
    return loss, tokens, report


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """Forward of one microbatch through this stage."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test data."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        lambda: mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage),
        config,
    ).build()


if __name__ == "__main__":
    datasets_provider.is_distributed = True
    args = parse_and_validate_args(extra_args_provider=extra_args)
    lorafusion.enable(args)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
