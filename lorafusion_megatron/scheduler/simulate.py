"""Runs a schedule on paper: event times per stage, optimizer steps, bubbles."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lorafusion_megatron.scheduler.cost import CostModel, Load, StageLoad
from lorafusion_megatron.scheduler.order import Op, Pipeline


@dataclass(frozen=True, slots=True)
class Event:
    """An op with its times in seconds."""

    op: Op
    start: float
    stop: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What each stage does when."""

    pipeline: Pipeline
    stages: tuple[tuple[Event, ...], ...]
    noops: frozenset[int]
    """Positions without a sample: their time counts as idle."""

    @cached_property
    def seconds(self) -> float:
        """From the first op's start to the last op's stop."""
        return max((stage[-1].stop for stage in self.stages if stage), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per stage the seconds spent on microbatches that hold samples."""
        return tuple(
            sum(event.stop - event.start for event in stage if event.op.microbatch not in self.noops)
            for stage in self.stages
        )

    @cached_property
    def bubble_share(self) -> float:
        """Idle share of all stages' time, 0 to 1."""
        total = self.seconds * len(self.stages)
        return 1 - sum(self.busy) / total if total else 0.0


def simulate(loads: Sequence[Load], pipeline: Pipeline, stages: Sequence[StageLoad], cost: CostModel) -> Timeline:
    """Event times of a stream of microbatches under Megatron's schedule.

    An op starts when its stage has finished the op before it and its input has come: a forward needs the chunk
    before, a backward the chunk after (the last chunk's needs its own forward).

    Args:
        loads: per position; with several replicas the slowest one's.
        pipeline: shape of the pipeline.
        stages: per chunk of the model, in the model's order, what it holds.
        cost: predicted rates.

    Returns:
        The timeline.

    Note: messages take no time beyond ``Rates.fixed``: Megatron's paired send-receive makes exactly these waits.
    Takes about 1 us for an op.
    """
    if len(stages) != pipeline.chunks:
        raise ValueError(f"{len(stages)} chunk loads for {pipeline.chunks} chunks")
    kinds: dict[tuple[StageLoad, bool], list[float]] = {
        (stage, backward): [cost.seconds(load, stage, backward=backward) for load in loads]
        for stage in set(stages)
        for backward in (False, True)
    }
    count, last = len(loads), pipeline.chunks - 1
    orders = [pipeline.order(stage, count) for stage in range(pipeline.stages)]
    done: dict[tuple[bool, int], list[float]] = {
        (backward, piece): [-1.0] * count for backward in (False, True) for piece in range(pipeline.chunks)
    }
    events: list[list[Event]] = [[] for _ in orders]
    clock = [0.0] * len(orders)
    runnable = deque(range(len(orders)))
    while runnable:
        stage = runnable.popleft()
        order, mine, now = orders[stage], events[stage], clock[stage]
        advanced = False
        while len(mine) < len(order):
            op = order[len(mine)]
            piece = op.chunk * pipeline.stages + stage
            if not op.backward:
                ready = done[False, piece - 1][op.microbatch] if piece else 0.0
            else:
                ready = done[piece < last, piece + 1 if piece < last else piece][op.microbatch]
            if ready < 0:
                break
            start = max(now, ready)
            now = start + kinds[stages[piece], op.backward][op.microbatch]
            done[op.backward, piece][op.microbatch] = now
            mine.append(Event(op, start, now))
            advanced = True
        clock[stage] = now
        if advanced:
            runnable.extend({(stage + 1) % len(orders), (stage - 1) % len(orders)} - {stage})
    assert all(len(mine) == len(order) for mine, order in zip(events, orders, strict=True)), "the order deadlocks"
    return Timeline(
        pipeline=pipeline,
        stages=tuple(map(tuple, events)),
        noops=frozenset(position for position, load in enumerate(loads) if load.tokens == 0),
    )
