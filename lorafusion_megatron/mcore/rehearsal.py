"""A rank's first microbatch by itself, before any message: what is compiled and measured then, all stages do at once.

Triton compiles a kernel, and the tuner measures a product, at its first call. In the pipeline stage 1 first meets them
when stage 0 has sent, and stage 0's backward when the last stage's is done, so that with many stages the first
microbatch takes the sum of what the stages take, and may take longer than NCCL waits.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from .steps import AdapterSteps
from .window import DeviceBatch


def rehearse(chunks: Sequence[torch.nn.Module], batch: DeviceBatch, steps: Iterable[AdapterSteps]) -> None:
    """Run a microbatch forward and backward through each chunk of this rank, and forget what it left.

    Where the chunk's input comes from another stage, and where its output's gradient does, random numbers stand in.
    Tensor-parallel ranks meet in the layers' own collectives, so all of them call it.

    Args:
        chunks: this rank's model chunks.
        batch: a microbatch with samples.
        steps: of all jobs; none may be pending, and no gradient be under way: their gradients are zero afterwards.
    """
    generator = torch.Generator(batch.input_ids.device).manual_seed(0)  # the model's own random state stays as it is
    for chunk in chunks:
        if not get_attr_wrapped_model(chunk, "pre_process"):
            get_attr_wrapped_model(chunk, "set_input_tensor")([_hidden(chunk, batch, generator)])
        output = chunk(batch.input_ids, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.packed)
        output.backward(torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype))
    for job_steps in steps:
        job_steps.discard_gradient()


def _hidden(chunk: torch.nn.Module, batch: DeviceBatch, generator: torch.Generator) -> torch.Tensor:
    """Random numbers in the place of what the stage before would send: ``[rows, 1, hidden]``."""
    config: Any = get_model_config(chunk)
    shards = parallel_state.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
    shape = (batch.input_ids.shape[1] // shards, 1, config.hidden_size)
    hidden = torch.randn(shape, generator=generator, device=generator.device, dtype=config.params_dtype)
    return hidden.requires_grad_()
