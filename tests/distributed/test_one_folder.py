"""A folder holds one run: two at once are refused, an older one's results move aside, another base is no resume."""

import json
import os
import shutil
import signal
import tempfile

import pytest
import yaml
from safetensors.torch import load_file, save_file

from lorafusion_megatron.training.signals import EXIT_STOPPED
from tests import launch, tiny
from tests.distributed.test_job_lifecycle import PP2, background, make, statuses
from tests.distributed.test_stop_and_resume import wait_for_lines


def start(run_file, folder, *words, world=2):
    """Run in ``folder``'s logs until it ends."""
    return launch.Ranks(
        launch.command, (["train", str(run_file), *PP2, *words],), world=world, folder=folder / "again"
    ).wait(60.0)


def test_a_second_run_in_the_folder_of_a_running_one_is_refused_and_leaves_it_alone(tmp_path):
    run_file, out = make(tmp_path, steps=400), tmp_path / "out"
    first = background(run_file)
    wait_for_lines(out, 3)
    second = start(run_file, tmp_path, "checkpoint.resume=never")
    assert set(second.statuses) == {2}
    (line,) = [line for output in second.outputs for line in output.splitlines() if "error" in line]
    assert f"checkpoint.save: {out} is in use by process {first.processes[0].pid} on " in line
    assert first.processes[0].is_alive()
    os.kill(first.processes[0].pid, signal.SIGKILL)
    first.wait(60.0)
    short = [f"jobs.{name}.train.train_iters=2" for name in ("a", "b")]
    third = start(run_file, tmp_path, "checkpoint.resume=never", *short)
    assert set(third.statuses) == {0}, "the lock of a killed process is gone"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 48, "num_attention_heads": 4, "head_dim": 8}, "the base model makes it [4, 48]"),
        ({"num_hidden_layers": 6}, "of layer 4 in"),
        ({"num_hidden_layers": 2}, "the base model has "),
        ({"seed": 7}, "holds other weights; the base model must be the one that the adapters began with"),
    ],
    ids=["other width", "more layers", "fewer layers", "other weights"],
)
def test_a_checkpoint_of_another_base_model_is_one_line_on_one_rank(tmp_path, change, words):
    run_file, out = make(tmp_path, steps=400), tmp_path / "out"
    ranks = background(run_file)
    wait_for_lines(out, 3)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert set(ranks.wait(60.0).statuses) == {EXIT_STOPPED}
    tiny.write_base(tmp_path / "base", **change)
    again = start(run_file, tmp_path)
    assert set(again.statuses) == {2}
    (line,) = [line for output in again.outputs for line in output.splitlines() if "error" in line]
    assert "base_model.path: " in line
    assert words in line
    assert "checkpoint.resume: never" in line
    assert "Traceback" not in "".join(again.outputs)


def test_a_run_that_begins_anew_moves_an_older_ones_results_aside_but_not_what_a_job_starts_from(tmp_path):
    run_file, out = make(tmp_path, steps=4), tmp_path / "out"
    run = yaml.safe_load(run_file.read_text())
    run["jobs"][0]["eval"] = {"path": run["jobs"][0]["dataset"]["path"], "interval": 2}
    run_file.write_text(yaml.safe_dump(run))
    launch.train(run_file, "checkpoint.save_interval=2", "checkpoint.keep=2")
    (out / "a" / "notes.txt").write_text("the user's own")
    shutil.copytree(out / "a", out / "left")  # a job that had been added, or has left the run file
    old = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    del run["jobs"][0]["eval"]
    run["jobs"][0]["train"] |= {"train_iters": 2}
    run["jobs"][1]["peft"]["init_from"] = str(out / "b")
    run_file.write_text(yaml.safe_dump(run))
    done = launch.train(run_file, "checkpoint.resume=never")
    (aside,) = out.glob("earlier-*")
    assert f"what an earlier run left in {out} was moved to {aside}" in done.outputs[0]
    moved = {str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()}
    assert {"metrics.jsonl", "a/evals.json", "a/best/adapter_config.json", "a/step_4/adapter_config.json"} <= moved
    assert moved <= set(map(str, old))
    assert not {"b/adapter_model.safetensors", "b/adapter_config.json", "a/notes.txt", "run.lock"} & moved
    assert not (out / "a" / "best").exists()
    assert {path.name for path in (out / "left").iterdir()} == {"notes.txt"}
    assert (aside / "left" / "best" / "adapter_model.safetensors").is_file()
    assert (out / "a" / "notes.txt").exists()
    assert len(json.loads((out / "a" / "losses.json").read_text())) == 2
    assert statuses(out) == {"a": "finished", "b": "finished"}
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2 + 4
    launch.train(run_file, "jobs.b.peft.init_from=null")  # goes on with what is there
    assert list(out.glob("earlier-*")) == [aside]


def test_a_run_that_can_not_begin_anew_moves_nothing_and_a_folder_on_another_disk_is_moved_too(tmp_path):
    run_file, out = make(tmp_path, steps=2), tmp_path / "out"
    (out / "b").parent.mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        (out / "b").symlink_to(other)
        launch.train(run_file)
        before = {
            path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "run.lock"
        }
        start_of_a = tmp_path / "init" / "a" / "adapter_model.safetensors"
        tensors = load_file(start_of_a)
        save_file(dict(list(tensors.items())[1:]), start_of_a)
        refused = start(run_file, tmp_path, "checkpoint.resume=never")
        assert refused.statuses == (2, 2)
        assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing was moved"
        save_file(tensors, start_of_a)
        launch.train(run_file, "checkpoint.resume=never")
        (aside,) = out.glob("earlier-*")
        assert (aside / "b" / "adapter_model.safetensors").is_file()
        assert (out / "b" / "adapter_model.safetensors").is_file()


def test_a_job_that_goes_on_may_have_lost_what_it_started_from_and_name_its_targets_in_another_order(tmp_path):
    run_file, out = make(tmp_path, steps=400), tmp_path / "out"
    ranks = background(run_file)
    wait_for_lines(out, 3)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert set(ranks.wait(60.0).statuses) == {EXIT_STOPPED}
    shutil.rmtree(tmp_path / "init" / "a")
    run = yaml.safe_load(run_file.read_text())
    targets = json.loads((tmp_path / "init" / "b" / "adapter_config.json").read_text())["target_modules"]
    run["jobs"][0]["peft"]["target_modules"] = targets[::-1]
    for job in run["jobs"]:
        job["train"]["train_iters"] = 20
    run_file.write_text(yaml.safe_dump(run))
    launch.train(run_file)
    assert statuses(out) == {"a": "finished", "b": "finished"}
    config = json.loads((out / "a" / "adapter_config.json").read_text())
    assert os.path.isabs(config["base_model_name_or_path"])
    run["jobs"][0]["name"] = "A"
    del run["jobs"][0]["peft"]["init_from"]
    run_file.write_text(yaml.safe_dump(run))
    refused = start(run_file, tmp_path)
    (line,) = [line for output in refused.outputs for line in output.splitlines() if "error" in line]
    assert "jobs.A.name: A where the checkpoint has a" in line
