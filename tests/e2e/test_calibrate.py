"""Rates that are fitted to a real run predict that run, and plans use them."""

import json

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.scheduler.cost import CostModel
from tests import launch, tiny


def test_rates_fitted_to_a_run_predict_its_forwards_and_backwards(tmp_path, capsys):
    run_file = tiny.tiny_run(tmp_path)
    words = [
        "model.pipeline_model_parallel_size=2",
        "jobs.first.train.train_iters=30",
        "jobs.second.train.train_iters=30",
    ]
    launch.train(run_file, *words, world=2)
    out = tmp_path / "out"
    assert main(["plan", str(run_file), *words, "--calibrate", str(out)]) == 0
    text = capsys.readouterr().out
    error = float(text.split("median error ")[1].split("%")[0])
    assert error < 60.0, "the median of a fit on a shared machine; a model that says nothing is off by 100 %"
    cost = CostModel.load(out / "cost_model.json")
    assert cost.forward.layer_token + cost.forward.layer_fixed + cost.forward.fixed > 0
    assert main(["plan", str(run_file), *words, f"runtime.cost_model={out / 'cost_model.json'}", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    measured = [event for event in json.loads((out / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    longest = max(event["ts"] + event["dur"] for event in measured) / 1e6
    assert 0.05 * longest < planned["staggered"]["predicted_seconds"] < 5 * longest


def test_a_folder_without_a_timeline_is_one_line(tmp_path, capsys):
    run_file = tiny.tiny_run(tmp_path)
    assert main(["plan", str(run_file), "--calibrate", str(tmp_path)]) == 2
    assert "--calibrate" in capsys.readouterr().err
