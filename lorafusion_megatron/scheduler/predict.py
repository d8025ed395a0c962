"""Predicted time of a stream of positions, and what of it the stages idle."""

from collections.abc import Sequence
from functools import partial

from lorafusion_megatron.scheduler.cost import Load
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.packing import padded_tokens
from lorafusion_megatron.scheduler.rows import Row, Samples, whole_groups
from lorafusion_megatron.scheduler.simulate import simulate
from lorafusion_megatron.scheduler.waits import waiting_time, window_width
from lorafusion_megatron.scheduler.weights import Weights


def predict_seconds(rows: Sequence[Row], options: PlanOptions, weights: Weights) -> float:
    """Predicted time of a stream: from `waiting_time` under 1F1B, which takes no time, else from the simulator."""
    if options.virtual_stages == 1:
        times = [max(map(weights.part, row.parts)) for row in rows]
        width = window_width(options.stages)
        edge = [0.0] * (width - 1)
        return waiting_time([*edge, *times, *edge], width)
    return simulated_seconds(rows, options)


def simulated_seconds(rows: Sequence[Row], options: PlanOptions) -> float:
    """Time of a stream in the simulator, about 1 us for each forward or backward of a chunk.

    An interleaved schedule takes whole groups of microbatches, as which the stream will run.
    """
    rows = whole_groups(rows, options.pipeline.accepted_count(len(rows)), options.replicas)
    loads = [max(map(partial(_load, options), row.parts), key=lambda load: (load.tokens, load.squares)) for row in rows]
    return simulate(loads, options.pipeline, options.chunk_loads, options.cost_model).seconds


def lost_share(rows: Sequence[Row], options: PlanOptions, weights: Weights) -> float:
    """Share of the slowest stage's time that it idles, filling and draining left out."""
    seconds = predict_seconds(rows, options, weights)
    times = [max(map(weights.part, row.parts)) for row in rows]
    edges = sum(times) / max(1, len(times)) * (options.stages - 1) / options.virtual_stages
    return max(0.0, 1 - (sum(times) + edges) / seconds) if seconds else 0.0


def _load(options: PlanOptions, part: Samples) -> Load:
    return Load(tokens=padded_tokens(part, options.padding_multiple), squares=sum(sample.tokens**2 for sample in part))
