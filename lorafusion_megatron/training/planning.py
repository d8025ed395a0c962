"""What a run's plan depends on, said once for `plan`, which only draws it, and `train`, which obeys it."""

import math
from collections.abc import Mapping
from typing import Any

from ..config.run import RunConfig, RuntimeConfig
from ..scheduler.cost import CostModel, Load, default_cost_model, split_loads
from ..scheduler.options import PlanOptions
from ..scheduler.split import best_layers, split_advice
from ..types import ModelSpec

TRITON_TILE = 64
"""Rows of a tile of the Triton kernels (`lora.triton_backend.TILE`, said again where torch is not needed)."""


def padding_multiple(runtime: RuntimeConfig, tile: int) -> int:
    """Rows that each job's part of a microbatch is padded to, for a backend's ``tile``."""
    return math.lcm(runtime.padding_multiple or 1, tile)


def expected_tile(runtime: RuntimeConfig) -> int:
    """The tile of the backend that trains where the run file leaves it to a machine with a GPU."""
    return 1 if runtime.device == "cpu" or runtime.lora_backend == "torch" else TRITON_TILE


def cost_model(run: RunConfig, spec: ModelSpec) -> CostModel:
    """Measured rates where the run names a file of them (`plan --calibrate`), else an estimate for an H100.

    Raises:
        UserError: the file is missing or is not a cost model.
    """
    if run.runtime.cost_model is not None:
        return CostModel.load(run.runtime.cost_model, key="runtime.cost_model")
    return default_cost_model(spec, tensor_parallel=run.model.tensor_model_parallel_size)


def choose_layers(
    run: RunConfig, spec: ModelSpec, cost: CostModel, datasets: Mapping[Any, Any]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Layers per chunk in the model's order, and advice where a given layout could be better.

    Args:
        run: the run file.
        spec: the base model.
        cost: predicted rates.
        datasets: the jobs' rows, of which ``lengths`` count: the split is balanced for a full microbatch of them.
    """
    model, capacity = run.model, run.runtime.token_capacity
    tokens = sum(int(rows.lengths.sum()) for rows in datasets.values())
    squares = sum(int((rows.lengths.astype("float64") ** 2).sum()) for rows in datasets.values())
    load = Load(tokens=capacity, squares=capacity * squares // max(1, tokens))
    stages = model.pipeline_model_parallel_size
    if model.pipeline_layout == "auto":
        return best_layers(cost, spec.num_layers, stages, model.chunks // stages, load), ()
    advice = split_advice(cost, model.pipeline_layout, stages, load)
    return model.pipeline_layout, (f"model.pipeline_layout: {advice}",) if advice else ()


def plan_options(
    run: RunConfig, *, layers: tuple[int, ...], replicas: int, padding_multiple: int, cost: CostModel
) -> PlanOptions:
    """What the windows of a run are planned for."""
    return PlanOptions(
        token_capacity=run.runtime.token_capacity,
        padding_multiple=padding_multiple,
        stages=run.model.pipeline_model_parallel_size,
        virtual_stages=run.model.virtual_pipeline_model_parallel_size or 1,
        replicas=replicas,
        schedule=run.runtime.schedule,
        effort=run.runtime.plan_effort,
        cost=cost,
        loads=split_loads(layers),
    )
