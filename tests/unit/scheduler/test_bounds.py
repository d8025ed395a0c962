"""The bound on idle time that the dependencies imply, against exhaustive search."""

import random
from collections.abc import Iterator, Sequence
from itertools import product

import pytest

from lorafusion_megatron.scheduler.bounds import lemma_bound, step_seconds
from lorafusion_megatron.scheduler.cost import CostModel, Load, Rates, equal_loads
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.simulate import Timeline, simulate
from lorafusion_megatron.types import GlobalBatch, Sample
from tests.unit.scheduler.instances import batches


def _options(stages: int, seed: int = 0) -> PlanOptions:
    rng = random.Random(seed)
    forward = Rates(fixed=rng.choice([0, 0.2]), layer_token=1.0, layer_square=rng.choice([0, 0.02]))
    backward = Rates(fixed=forward.fixed, layer_token=rng.choice([0.5, 1, 2]), layer_square=2 * forward.layer_square)
    return PlanOptions(
        token_capacity=100,
        stages=stages,
        cost=CostModel(forward=forward, backward=backward),
        loads=equal_loads(stages, stages),
    )


def _placements(samples: Sequence[Sample], positions: int, distance: int) -> Iterator[tuple[int, ...]]:
    """Every position of each sample that keeps a job's steps the distance apart."""
    for places in product(range(positions), repeat=len(samples)):
        first: dict[tuple[int, int], int] = {}
        last: dict[tuple[int, int], int] = {}
        for sample, place in zip(samples, places, strict=True):
            key = (sample.job, sample.step)
            first[key], last[key] = min(place, first.get(key, place)), max(place, last.get(key, place))
        if all(last.get((job, step - 1), -distance) + distance <= place for (job, step), place in first.items()):
            yield places


def _best(jobs: Sequence[Sequence[GlobalBatch]], positions: int, options: PlanOptions) -> Timeline:
    """The fastest schedule of at most ``positions`` positions."""
    samples = [sample for job in jobs for batch in job for sample in batch.samples]
    best = None
    for places in _placements(samples, positions, options.pipeline.distance()):
        loads = []
        for position in range(max(places) + 1):
            lengths = [s.tokens for s, place in zip(samples, places, strict=True) if place == position]
            loads.append(Load(tokens=sum(lengths), squares=sum(n * n for n in lengths)))
        timeline = simulate(loads, options.pipeline, options.chunk_loads, options.cost_model)
        if best is None or timeline.seconds < best.seconds:
            best = timeline
    assert best is not None
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("stages", "shape", "positions"), [(2, [[2, 2]], 6), (2, [[1, 1], [2]], 5), (3, [[2, 1]], 6), (3, [[1, 1], [1]], 6)]
)
def test_no_schedule_idles_less_than_the_bound(seed: int, stages: int, shape: list[list[int]], positions: int) -> None:
    rng = random.Random(seed)
    jobs = batches([[[rng.choice([1, 2, 5, 20]) for _ in range(count)] for count in job] for job in shape])
    options = _options(stages, seed)
    best = _best(jobs, positions, options)
    assert lemma_bound(jobs, options, best.busy) <= best.bubble_share + 1e-9
    chain = max(sum(step_seconds(batch, options) for batch in job) for job in jobs)
    assert chain <= best.seconds + 1e-9


def test_a_lone_job_reaches_the_bound() -> None:
    jobs = batches([[[2, 20], [20, 2]]])
    options = _options(2, seed=1)
    best = _best(jobs, 6, options)
    assert best.seconds == pytest.approx(sum(step_seconds(batch, options) for batch in jobs[0]), rel=0.1)


def test_what_stands_beside_the_longest_sample_counts_in_its_shorter_direction() -> None:
    rates = CostModel(forward=Rates(fixed=0.5, layer_token=1.0), backward=Rates(fixed=0.5, layer_token=2.0))
    options = PlanOptions(token_capacity=100, stages=4, cost=rates, loads=equal_loads(4, 4))
    (batch,) = batches([[[10, 4, 3]]])[0]
    # Down and up through 4 stages with 10 tokens; the forwards of 4 and 3 on the first of them.
    assert step_seconds(batch, options) == pytest.approx(4 * (1 + 30) + 7)
    (alone,) = batches([[[10]]])[0]
    assert step_seconds(alone, options) == pytest.approx(4 * 31)
