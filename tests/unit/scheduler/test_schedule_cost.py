"""The cost model, its fit, the stage split and the bounds."""

import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.bounds import lemma_bound, lemma_positions, split_bound
from lorafusion_megatron.scheduler.cost import (
    CostModel,
    DeviceRates,
    Load,
    Measurement,
    Rates,
    StageLoad,
    default_cost_model,
    fit_cost_model,
    split_loads,
)
from lorafusion_megatron.scheduler.options import REFERENCE_MODEL, PlanOptions
from lorafusion_megatron.scheduler.split import best_layers, critical_seconds, split_advice
from tests.unit.scheduler.instances import batches

COST = CostModel(
    forward=Rates(fixed=1e-3, layer_fixed=1e-4, layer_token=2e-7, layer_square=3e-11, output_token=5e-7),
    backward=Rates(fixed=2e-3, layer_fixed=3e-4, layer_token=3e-7, layer_square=8e-11, output_token=4e-7),
)


def measurements(noise: float) -> list[Measurement]:
    rng = random.Random(0)
    rows = []
    for backward, layers, output, length in product((False, True), (2, 5), (False, True), (128, 512, 2048)):
        load = Load(tokens=8192 if length < 2048 else 6144, squares=length * 8192)
        seconds = COST.seconds(load, StageLoad(layers=layers, output=float(output)), backward=backward)
        rows.append(
            Measurement(
                backward=backward,
                layers=layers,
                output=output,
                load=load,
                seconds=seconds * (1 + noise * rng.uniform(-1, 1)),
            )
        )
    rows += [
        Measurement(
            backward=backward,
            layers=2,
            output=False,
            load=Load(tokens=1024, squares=1024 * 128),
            seconds=COST.seconds(Load(tokens=1024, squares=1024 * 128), StageLoad(layers=2), backward=backward),
        )
        for backward in (False, True)
    ]
    return rows


def test_fit_finds_the_rates_it_was_measured_from() -> None:
    fitted = fit_cost_model(measurements(0.0))
    for name in ("fixed", "layer_fixed", "layer_token", "layer_square", "output_token"):
        assert getattr(fitted.forward, name) == pytest.approx(getattr(COST.forward, name), rel=1e-3)
        assert getattr(fitted.backward, name) == pytest.approx(getattr(COST.backward, name), rel=1e-3)


def test_fit_of_noisy_times_predicts_and_is_never_negative() -> None:
    fitted = fit_cost_model(measurements(0.05))
    rates = [*vars(fitted.forward).values(), *vars(fitted.backward).values()]
    assert min(rates) >= 0
    load, stage = Load(tokens=4096, squares=4096 * 700), StageLoad(layers=4, output=1)
    for backward in (False, True):
        assert fitted.seconds(load, stage, backward=backward) == pytest.approx(
            COST.seconds(load, stage, backward=backward), rel=0.06
        )


def test_a_fitted_rate_that_is_too_small_to_count_is_none() -> None:
    rows = [replace(row, seconds=row.seconds * 1e-9) for row in measurements(0.0)]
    fitted = fit_cost_model(rows)
    fitted.check()
    assert fitted.forward.layer_square == 0, "3e-20 seconds"
    assert fitted.forward.layer_token == pytest.approx(2e-16, rel=1e-3)


def test_fit_needs_enough_rows() -> None:
    with pytest.raises(ValueError, match="can't fit 5 rates"):
        fit_cost_model(measurements(0.0)[:6])


def test_saved_model_is_read_back(tmp_path: Path) -> None:
    COST.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == COST


@pytest.mark.parametrize("text", ["", "[]", '{"forward": {"speed": 1}, "backward": {}}'])
def test_a_broken_saved_model_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(UserError, match="cost model is the JSON file"):
        CostModel.load(tmp_path / "cost.json")


@pytest.mark.parametrize(
    ("rate", "value"),
    [
        ("layer_token", "NaN"),
        ("fixed", "Infinity"),
        ("layer_square", "-1e-9"),
        ("fixed", '"a"'),
        ("fixed", "true"),
        ("layer_token", "1e308"),
        ("layer_token", "1e-300"),
        pytest.param("fixed", "1" + "0" * 400, id="10**400"),
    ],
)
def test_rates_that_are_no_seconds_are_refused(tmp_path: Path, rate: str, value: str) -> None:
    COST.save(tmp_path / "cost.json")
    saved = json.loads((tmp_path / "cost.json").read_text())
    saved["backward"][rate] = "VALUE"
    (tmp_path / "cost.json").write_text(json.dumps(saved).replace('"VALUE"', value))
    with pytest.raises(UserError, match=f"backward.{rate}") as refused:
        CostModel.load(tmp_path / "cost.json", key="runtime.cost_model")
    assert refused.value.key == "runtime.cost_model"
    assert len(refused.value.given) < len(str(tmp_path)) + 150


@pytest.mark.parametrize("text", ['{"forward": {}, "backward": {}}', "[" * 100_000], ids=["nothing", "deep"])
def test_rates_without_which_no_plan_can_be_made_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(UserError, match="a cost model is the JSON file"):
        CostModel.load(tmp_path / "cost.json")


def test_default_rates_follow_the_dimensions() -> None:
    device = DeviceRates(
        linear_flops=1e12, output_flops=2e12, attention_flops=1e12, memory_bytes=1e30, adapter_bytes=1e30
    )
    cost = default_cost_model(REFERENCE_MODEL, device=device)
    parameters = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
    assert cost.forward.layer_token == pytest.approx(2 * parameters / 1e12)
    assert cost.forward.layer_square == pytest.approx(2 * 4096 / 1e12)
    assert cost.backward.layer_square == pytest.approx(5 * 4096 / 1e12)
    assert cost.forward.output_token == pytest.approx(2 * 4096 * 128256 / 2e12)
    halved = default_cost_model(REFERENCE_MODEL, tensor_parallel=2, device=device)
    assert halved.forward.layer_token == pytest.approx(cost.forward.layer_token / 2)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("output_token", [0.0, 2e-7, 1e-6])
def test_best_layers_agree_with_exhaustive_search(stages: int, output_token: float) -> None:
    rates = Rates(layer_token=2e-7, output_token=output_token)
    cost = CostModel(forward=rates, backward=rates)
    best = best_layers(cost, 13, stages)
    splits = [split for split in product(range(1, 14), repeat=stages) if sum(split) == 13]
    assert sum(best) == 13
    assert critical_seconds(cost, best, stages) == min(critical_seconds(cost, split, stages) for split in splits)


def test_chunks_of_a_stage_share_its_layers() -> None:
    layers = best_layers(COST, 16, 4, 2)
    assert len(layers) == 8
    assert sum(layers) == 16
    assert min(layers) >= 1
    assert layers[3] + layers[7] < layers[2] + layers[6]


def test_advice_says_what_would_be_faster() -> None:
    rates = Rates(layer_token=1e-7, output_token=1e-7)
    cost = CostModel(forward=rates, backward=rates)
    assert split_advice(cost, [3, 5], 2) == "layers [4, 4] instead of [3, 5] would make the slowest stage 16.7% faster"
    assert split_advice(cost, [4, 4], 2) is None


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(UserError, match="3 layers on 2 stages of 2 chunks; each chunk needs a layer"):
        best_layers(COST, 3, 2, 2)


def test_split_bound_is_the_idle_share_of_uneven_stages() -> None:
    rates = Rates(layer_token=1.0)
    cost = CostModel(forward=rates, backward=rates)
    total = Load(tokens=10, squares=0)
    assert split_bound(cost, split_loads([3, 1]), 2, total, 1) == pytest.approx(1 - 2 / 3)
    assert split_bound(cost, split_loads([2, 2]), 2, total, 1) == 0


def test_lemma_bound_of_a_lone_job() -> None:
    # One sample a step on 4 stages: each step waits for the way there and back, 3 of 4 stages always idle.
    jobs = batches([[[10]] * 5])
    options = PlanOptions(
        token_capacity=10,
        stages=4,
        cost=CostModel(forward=Rates(layer_token=1.0), backward=Rates(layer_token=1.0)),
        loads=(StageLoad(layers=1),) * 4,
    )
    assert lemma_bound(jobs, options, [100.0] * 4) == pytest.approx(0.75)
    assert lemma_positions(jobs, options) == 5 + 4 * 3
    assert lemma_bound(jobs, options, [1000.0] * 4) == 0
