"""A script's own model becomes the frozen base: its weights from the run file, the jobs' adapters in its linears."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import get_model_config

from ...errors import UserError
from ...lora.layout import TargetLinear
from ...mcore.build import prepare_base
from ...mcore.parallel import Groups
from ...scheduler.cost import split_loads
from ...training.rack import load_and_inject
from ...training.setup import Prepared
from .model_config import check_model_config


def take_over(
    chunks: Sequence[torch.nn.Module], prepared: Prepared, groups: Groups
) -> tuple[Prepared, list[TargetLinear]]:
    """Freeze a stage's model chunks, fill them with the base model's weights and inject the adapters.

    Args:
        chunks: as the script's provider built them, on the device and in their final type, wrapped or not.
        prepared: the checked run.
        groups: this rank's groups.

    Returns:
        The run with the layers of the script's own layout, and the linears that adapters may target.

    Raises:
        UserError: a chunk is no GPTModel, computes something else than the base model, or the checkpoint doesn't fit.
    """
    models = [_gpt_model(chunk) for chunk in chunks]
    for model in models:
        check_model_config(model, prepared.spec)
        prepare_base(model, prepared.spec)
        configure(get_model_config(model))
    return with_layers_of(prepared, models, groups), load_and_inject(models, prepared, groups)


def configure(config: Any) -> None:
    """Set a model's configuration for a stream of packed microbatches of different lengths.

    ``calculate_per_token_loss`` makes the schedules take the loss as it is, without dividing by the number of
    microbatches; ``variable_seq_lengths`` keeps Megatron from taking all for equally long. Messages are exchanged as
    `build.transformer_config` says, and the interleaved schedule takes the groups of microbatches that the plan counts
    on. A base without gradients has none to reduce after the pass.
    """
    config.variable_seq_lengths = True
    config.moe_token_dispatcher_type = "alltoall"
    config.overlap_p2p_comm = config.overlap_p2p_comm_warmup_flush = False
    config.microbatch_group_size_per_vp_stage = config.pipeline_model_parallel_size
    config.batch_p2p_comm = True
    config.batch_p2p_sync = False
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = nothing_to_finalize


def with_layers_of(prepared: Prepared, models: Sequence[Any], groups: Groups) -> Prepared:
    """The run with the layers that the chunks really have, which the plan's costs go by; every rank calls it.

    Args:
        prepared: the checked run.
        models: this rank's language models, one a virtual stage.
        groups: this rank's groups.
    """
    everyone = groups.gather((groups.pp_rank, [len(model.decoder.layers) for model in models]))
    by_stage = groups.broadcast(dict(everyone) if everyone else None)
    stages = range(groups.pp_size)
    layers = tuple(by_stage[stage][chunk] for chunk in range(len(models)) for stage in stages)
    # A hybrid model has attention and MLP as layers of their own; the costs are those of the base model's layers.
    share = prepared.spec.num_layers / sum(layers)
    loads = tuple(replace(load, layers=load.layers * share) for load in split_loads(layers))
    return replace(prepared, layers_per_chunk=layers, plan_options=replace(prepared.plan_options, loads=loads))


def nothing_to_finalize(*_: Any, **__: Any) -> None:
    """In place of Megatron's reduction of the base's gradients: there are none."""


def _gpt_model(chunk: torch.nn.Module) -> GPTModel:
    while not isinstance(chunk, GPTModel) and isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module
    if not isinstance(chunk, GPTModel):
        raise UserError(
            f"the script builds a {type(chunk).__name__}",
            rule="weights of base_model.path go into a GPTModel",
            remedy="build a GPTModel (gpt_config_from_args, or a model provider that returns one)",
            key="--lorafusion-config",
        )
    return chunk
