"""How many layers each stage should hold: the output layer makes the last stage slow."""

from collections.abc import Sequence

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.bounds import stage_work
from lorafusion_megatron.scheduler.cost import CostModel, Load, split_loads

TYPICAL_LOAD = Load(tokens=8192, squares=8192 * 1024)
"""A full microbatch of samples of 1,024 tokens: what a split is judged by where no data is known."""


def best_layers(
    cost: CostModel, num_layers: int, stages: int, virtual_stages: int = 1, load: Load = TYPICAL_LOAD
) -> tuple[int, ...]:
    """Layers per chunk for which the slowest stage is fastest.

    The last stage gives layers away while that lowers the maximum; the rest is spread evenly. Stages before the last
    that hold one layer more than others stand late in the pipeline, where fewer microbatches wait in memory.

    Args:
        cost: predicted rates.
        num_layers: of the model.
        stages: pipeline stages.
        virtual_stages: chunks per stage.
        load: the microbatch to balance for.

    Returns:
        One number per chunk in the model's order, each at least 1.

    Raises:
        UserError: fewer layers than chunks.
    """
    if num_layers < stages * virtual_stages:
        raise UserError(
            f"{num_layers} layers on {stages} stages of {virtual_stages} chunks",
            rule="each chunk needs a layer",
            remedy="lower pipeline_model_parallel_size or virtual_pipeline_model_parallel_size",
            key="model.pipeline_model_parallel_size",
        )
    if stages == 1:
        return _chunks([num_layers], virtual_stages)
    candidates = []
    for last in range(virtual_stages, num_layers - virtual_stages * (stages - 1) + 1):
        base, more = divmod(num_layers - last, stages - 1)
        per_stage = [base] * (stages - 1 - more) + [base + 1] * more + [last]
        layers = _chunks(per_stage, virtual_stages)
        candidates.append((critical_seconds(cost, layers, stages, load), -last, layers))
    return min(candidates)[2]


def critical_seconds(cost: CostModel, layers: Sequence[int], stages: int, load: Load = TYPICAL_LOAD) -> float:
    """Seconds that the slowest stage takes for one microbatch, forward and backward."""
    return max(stage_work(cost, split_loads(layers), stages, load, 1))


def split_advice(cost: CostModel, layers: Sequence[int], stages: int, load: Load = TYPICAL_LOAD) -> str | None:
    """What to tell a user whose split could be better; None where it is the best."""
    best = best_layers(cost, sum(layers), stages, len(layers) // stages, load)
    now, then = critical_seconds(cost, layers, stages, load), critical_seconds(cost, best, stages, load)
    if then >= 0.999 * now:
        return None
    return f"layers {list(best)} instead of {list(layers)} would make the slowest stage {1 - then / now:.1%} faster"


def _chunks(per_stage: Sequence[int], virtual_stages: int) -> tuple[int, ...]:
    """Spread each stage's layers over its chunks, the model's last chunks the smaller ones."""
    out = []
    for chunk in range(virtual_stages):
        for layers in per_stage:
            base, more = divmod(layers, virtual_stages)
            out.append(base + (1 if chunk < more else 0))
    return tuple(out)
