"""Models that somebody else built and filled, such as Megatron-Bridge's AutoBridge: the jobs train on them as they are.

Linears are taken over by their type, wherever they stand, so a GPTModel, a HybridModel of attention and MLP layers, or
a wrapped one will do. Nothing here imports Megatron-Bridge.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.utils import get_model_config

from ..config.run import RunConfig
from ..errors import UserError
from ..mcore import parallel
from ..mcore.build import prepare_base
from ..mcore.inject import inject
from ..mcore.parallel import Groups
from ..training.hosts import world_size
from ..training.progress import make_progress
from ..training.rack import InjectedModel
from ..training.setup import Prepared, linear_layouts, prepare
from ..training.signals import StopRequest
from ..training.trainer import Trainer
from ..types import ModelSpec, Topology
from .megatron_lm.base import configure, with_layers_of
from .megatron_lm.model_config import check_model_config


def train_models(models: Sequence[torch.nn.Module], run: RunConfig) -> bool:
    """Train the jobs of a run on a rank's model chunks, whose weights are loaded; every rank calls it.

    Args:
        models: one a virtual stage, wrapped or not, on the device, in ``base_model.dtype``.
        run: the run; ``base_model.path`` is the Hugging Face directory that the models were made from, ``model`` the
            layout that Megatron's process groups have.

    Returns:
        True where every job ended; False where a signal ended the run after its state was saved.

    Raises:
        UserError: the run doesn't fit the models or the process groups, or a model can't serve adapters.
    """
    device = next(models[0].parameters()).device
    prepared = prepare(run, gpu=device if device.type == "cuda" else None)
    _check_layout(run)
    groups = parallel.join(device=device, timeout_minutes=run.runtime.distributed_timeout_minutes)
    model = accept_models(models, prepared, groups)
    prepared = with_layers_of(prepared, [_language_model(chunk) for chunk in models], groups)
    logger, stop = run.logger, StopRequest()
    progress = make_progress(is_first=groups.is_first, log_interval=logger.log_interval, log_format=logger.log_format)
    try:
        for note in prepared.notes:
            progress.note(note)
        return Trainer(prepared, groups, progress, stop, model=model).train()
    finally:
        progress.close()
        stop.restore()


def accept_models(models: Sequence[torch.nn.Module], prepared: Prepared, groups: Groups) -> InjectedModel:
    """Freeze a rank's model chunks and take their linears over; weights stay as they are.

    Args:
        models: one a virtual stage, wrapped or not.
        prepared: the checked run.
        groups: this rank's groups.

    Returns:
        The chunks as they were given, and the linears that adapters may target.

    Raises:
        UserError: a model differs from the base model of the run, has experts, or its attention takes no packed
            samples.
    """
    targets = []
    layouts = linear_layouts(prepared.spec, groups.tp_rank, groups.tp_size)
    for chunk in models:
        model = _language_model(chunk)
        config = get_model_config(model)
        _check_model(model, config, prepared.spec)
        _check_sequence_parallel(config, prepared.topology)
        prepare_base(model, prepared.spec)
        configure(config)
        targets += inject(
            [model],
            layouts,
            backend=prepared.backend,
            tp_rank=groups.tp_rank,
            tp_size=groups.tp_size,
            layer_of=_numbering(model),
        )
    return InjectedModel(chunks=models, targets=sorted(targets, key=lambda t: (t.layer, t.adapters.name)))


def _language_model(chunk: torch.nn.Module) -> Any:
    while not hasattr(chunk, "decoder") and isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module
    if not hasattr(chunk, "decoder"):
        raise _unfit(f"a {type(chunk).__name__} has no decoder", "a language model of Megatron-Core is needed")
    return chunk


def _numbering(model: Any) -> Callable[[Any], int] | None:
    """Hugging Face's layer of a block; a HybridModel counts attention and MLP as layers of their own."""
    pattern = getattr(model, "hybrid_layer_pattern", None)
    if pattern is None:
        return None
    symbols = pattern.split("/")[0].replace("|", "")

    def layer_of(block: Any) -> int:
        number = block.layer_number - 1
        return symbols[:number].count(symbols[number])

    return layer_of


def _check_layout(run: RunConfig) -> None:
    topology = run.topology(world_size())
    for key, ours, theirs in (
        (
            "tensor_model_parallel_size",
            topology.tensor_parallel,
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (
            "pipeline_model_parallel_size",
            topology.pipeline_parallel,
            parallel_state.get_pipeline_model_parallel_world_size(),
        ),
        (
            "virtual_pipeline_model_parallel_size",
            topology.virtual_pipeline,
            parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        ),
    ):
        _check_equal(
            key,
            ours,
            theirs,
            "Megatron's process groups",
            rule="the models lie over the ranks as their builder laid them out",
        )


def _check_model(model: Any, config: Any, spec: ModelSpec) -> None:
    if config.num_moe_experts is not None:
        raise _unfit(f"{config.num_moe_experts} experts", "base models with experts are not supported")
    if any(isinstance(module, DotProductAttention) for module in model.modules()):
        raise _unfit(
            "Megatron's local DotProductAttention takes no packed samples",
            "the attention must be Transformer Engine's or mcore.attention.PackedAttention",
        )
    check_model_config(model, spec)


def _check_sequence_parallel(config: Any, topology: Topology) -> None:
    _check_equal(
        "sequence_parallel",
        topology.sequence_parallel,
        config.sequence_parallel and topology.tensor_parallel > 1,
        "the models' configuration",
        rule="microbatches are padded to what the layers divide among ranks",
    )


def _check_equal(key: str, ours: Any, theirs: Any, where: str, *, rule: str) -> None:
    if ours != theirs:
        raise UserError(
            f"{ours} in the run file, {theirs} in {where}", rule=rule, remedy="make them equal", key=f"model.{key}"
        )


def _unfit(given: str, rule: str) -> UserError:
    return UserError(
        given, rule=rule, remedy="build the models from base_model.path, with layers that fit", key="base_model.path"
    )
