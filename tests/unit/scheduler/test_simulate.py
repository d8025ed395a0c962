"""The simulator against times worked out by hand and by another method."""

import random

import pytest

from lorafusion_megatron.scheduler.cost import CostModel, Load, Rates, StageLoad
from lorafusion_megatron.scheduler.order import Pipeline
from lorafusion_megatron.scheduler.simulate import simulate
from lorafusion_megatron.scheduler.waits import waiting_time, window_width

UNIT = CostModel(forward=Rates(layer_token=1.0), backward=Rates(layer_token=2.0))
"""A token and layer takes 1 s forward and 2 s backward."""


def loads(*tokens: int) -> list[Load]:
    return [Load(tokens=n, squares=n * n) for n in tokens]


def test_equal_microbatches_idle_for_fill_and_drain_alone() -> None:
    timeline = simulate(loads(*[1] * 6), Pipeline(stages=4), [StageLoad(layers=1)] * 4, UNIT)
    # The classic 1F1B: (stages - 1 + microbatches) * (forward + backward).
    assert timeline.seconds == pytest.approx((3 + 6) * 3)
    assert timeline.busy == pytest.approx((18,) * 4)
    assert timeline.bubble_share == pytest.approx(3 / 9)


def test_interleaving_halves_fill_and_drain() -> None:
    chunks = [StageLoad(layers=0.5)] * 8
    timeline = simulate(loads(*[1] * 8), Pipeline(stages=4, virtual_stages=2), chunks, UNIT)
    assert timeline.seconds == pytest.approx(8 * 3 + 3 * 3 / 2)


def test_one_stage_never_idles() -> None:
    timeline = simulate(loads(3, 1, 2), Pipeline(), [StageLoad(layers=2)], UNIT)
    assert timeline.seconds == pytest.approx(2 * 3 * 6)
    assert timeline.bubble_share == 0


def test_a_noop_takes_its_fixed_time_and_counts_as_idle() -> None:
    cost = CostModel(forward=Rates(layer_token=1.0, fixed=0.25), backward=Rates(layer_token=2.0, fixed=0.5))
    timeline = simulate(loads(1, 0, 1), Pipeline(), [StageLoad(layers=1)], cost)
    assert timeline.seconds == pytest.approx(2 * 3.75 + 0.75)
    assert timeline.bubble_share == pytest.approx(0.75 / 8.25)


def test_attention_and_the_output_layer_are_counted() -> None:
    rates = Rates(fixed=1.0, layer_fixed=10.0, layer_token=100.0, layer_square=1000.0, output_token=10000.0)
    cost = CostModel(forward=rates, backward=Rates())
    load = Load(tokens=3, squares=5)
    assert cost.seconds(load, StageLoad(layers=2, output=1), backward=False) == 1 + 2 * (10 + 300 + 5000) + 30000
    assert cost.seconds(load, StageLoad(layers=2), backward=False) == 1 + 2 * (10 + 300 + 5000)
    assert cost.seconds(load, StageLoad(layers=2, output=1), backward=True) == 0


@pytest.mark.parametrize("stages", [1, 2, 4, 7])
@pytest.mark.parametrize("virtual", [1, 2])
def test_times_are_the_longest_paths(stages: int, virtual: int) -> None:
    """Relax all precedences until nothing changes (Bellman and Ford): the same starts."""
    if stages == 1 and virtual > 1:
        pytest.skip("one stage has no interleaved schedule")
    rng = random.Random(stages * 10 + virtual)
    pipeline = Pipeline(stages=stages, virtual_stages=virtual)
    count = pipeline.accepted_count(9)
    chunks = [StageLoad(layers=rng.randint(1, 4)) for _ in range(pipeline.chunks)]
    work = loads(*(rng.choice([0, 1, 5, 9]) for _ in range(count)))
    timeline = simulate(work, pipeline, chunks, UNIT)
    starts = {(stage, event.op): event.start for stage, events in enumerate(timeline.stages) for event in events}

    def seconds(stage: int, op) -> float:  # type: ignore[no-untyped-def]
        return UNIT.seconds(work[op.microbatch], chunks[op.chunk * stages + stage], backward=op.backward)

    def before(stage: int, op):  # type: ignore[no-untyped-def]
        piece = op.chunk * stages + stage
        order = pipeline.order(stage, count)
        at = order.index(op)
        if at:
            yield stage, order[at - 1]
        previous = piece + 1 if op.backward else piece - 1
        kind = op.backward
        if op.backward and previous == pipeline.chunks:
            previous, kind = piece, False
        if previous >= 0:
            yield previous % stages, type(op)(kind, previous // stages, op.microbatch)

    found = dict.fromkeys(starts, 0.0)
    changed = True
    while changed:
        changed = False
        for stage, op in found:
            start = max((found[key] + seconds(*key) for key in before(stage, op)), default=0.0)
            changed |= start != found[stage, op]
            found[stage, op] = start
    assert starts == found


def test_waiting_time_is_the_sum_of_window_maxima() -> None:
    rng = random.Random(3)
    times = [rng.random() for _ in range(40)]
    for width in range(1, 9):
        expected = sum(max(times[i : i + width]) for i in range(len(times) - width + 1))
        assert waiting_time(times, width) == pytest.approx(expected)


def test_waiting_time_predicts_the_simulator() -> None:
    rng = random.Random(5)
    for stages in (4, 8):
        tokens = [rng.randint(50, 150) for _ in range(300)]
        seconds = simulate(loads(*tokens), Pipeline(stages=stages), [StageLoad(layers=1)] * stages, UNIT).seconds
        width = window_width(stages)
        pad = [0.0] * (width - 1)
        assert waiting_time([*pad, *(3.0 * n for n in tokens), *pad], width) == pytest.approx(seconds, rel=0.03)
