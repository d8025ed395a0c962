"""Pretraining scripts through Megatron's own `pretrain(...)`: the same adapters as training each job alone in PEFT."""

import difflib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorafusion_megatron.integrations.megatron_lm.options import REFUSALS
from tests import launch, tiny
from tests.distributed.megatron_lm import (
    PROVIDER_SCRIPT,
    ROOT,
    SCRIPT,
    enabling_and_disabling,
    model_words,
    pretrain,
    run_in_folder,
    start,
)
from tests.oracle.case import TOLERANCE, OracleCase, make_case
from tests.unit.tiny_inputs import write_model, write_tokenizer

TOPOLOGIES = {
    "one process": (1, ""),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "TP2 SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "DP2 full recompute": (2, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "PP2 interleaved": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
}
JOBS = ("job0", "job1", "job2")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> OracleCase:
    """Three jobs on a Llama of four layers, trained alone by Transformers + PEFT."""
    return make_case(tmp_path_factory.mktemp("case"), arch="llama")


@pytest.fixture(scope="module")
def tied_case(tmp_path_factory) -> OracleCase:
    """Three jobs on a Qwen3 with a tied output layer."""
    return make_case(tmp_path_factory.mktemp("tied"), arch="qwen3", tied=True, seed=7)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_script_trains_the_adapters_that_peft_trains(case, tmp_path, measured, topology):
    world, words = TOPOLOGIES[topology]
    board = ("--tensorboard-dir", str(tmp_path / "board"), "--tensorboard-log-interval", "1")
    logging = (*board, "--log-params-norm", "--log-throughput")
    finished = pretrain(SCRIPT, case.run_file, tmp_path / "out", *words.split(), *logging, world=world).check()
    assert measured(case.error(tmp_path / "out")) <= TOLERANCE
    # Megatron's own log line, on the last rank, with the last loss of every job.
    line = re.search(r"iteration +1/ +1 \|.*", finished.outputs[-1])
    assert line is not None, finished.outputs[-1][-2000:]
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in JOBS:
        last = tiny.losses(tmp_path / "out", name)[-1]
        assert f"job/{name}/loss: {last:.6E} |" in line.group(0)
        assert [event.value for event in events.Scalars(f"job/{name}/loss")] == [pytest.approx(last, rel=1e-6)]
    norm = float(re.search(r"params norm: ([0-9.]+) \|", line.group(0)).group(1))
    assert norm == pytest.approx(_norm_of_base(case), abs=1e-3)
    microbatches = int(re.search(r"global batch size: +(\d+) \|", line.group(0)).group(1))
    assert microbatches == _microbatches(tmp_path / "out")


def test_a_script_with_a_model_provider_and_a_tied_output_layer_over_two_stages(tied_case, tmp_path, measured):
    pretrain(
        PROVIDER_SCRIPT, tied_case.run_file, tmp_path / "out", "--pipeline-model-parallel-size", "2", world=2
    ).check()
    assert measured(tied_case.error(tmp_path / "out")) <= TOLERANCE


def test_save_and_load_go_on_to_the_same_last_bit(case, tmp_path):
    windows = ("runtime.max_window_microbatches=4",)
    save = ("--save", str(tmp_path / "saved"), "--save-interval", "1")
    pretrain(SCRIPT, case.run_file, tmp_path / "whole", overrides=windows).check()
    left = pretrain(SCRIPT, case.run_file, tmp_path / "first", *save, "--exit-interval", "1", overrides=windows).check()
    assert "exiting program at iteration 1" in left.outputs[0]
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert json.loads((tmp_path / "first" / "status.json").read_text())["state"] == "stopped"
    stopped, whole = (tiny.losses(tmp_path / out, "job2") for out in ("first", "whole"))
    assert 0 < len(stopped) < len(whole), "its adapter is there as it was at the stop"
    assert stopped == whole[: len(stopped)]
    load = ("--load", str(tmp_path / "saved"), *save)
    second = pretrain(SCRIPT, case.run_file, tmp_path / "second", *load, overrides=windows).check()
    assert f"resuming from {tmp_path / 'saved' / 'iter_0000001'}" in second.outputs[0]
    iterations = re.findall(r"iteration +(\d+)/ +(\d+) \|", second.outputs[0])
    assert iterations[0][0] == "2"
    assert iterations[-1][0] == iterations[-1][1]
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == iterations[-1][0]
    for name in JOBS:
        assert tiny.same_bits(tiny.adapter(tmp_path / "second", name), tiny.adapter(tmp_path / "whole", name))
        assert tiny.losses(tmp_path / "second", name) == tiny.losses(tmp_path / "whole", name)
    again = pretrain(SCRIPT, case.run_file, tmp_path / "second", overrides=windows).check()
    assert "every job has ended already" in again.outputs[0]
    assert tiny.same_bits(tiny.adapter(tmp_path / "second", "job2"), tiny.adapter(tmp_path / "whole", "job2"))


def test_a_signal_stops_within_a_window_and_another_layout_goes_on(case, tmp_path, measured):
    longer = tuple(f"jobs[{index}].train.train_iters={40 + 10 * index}" for index in range(3))
    save = ("--save", str(tmp_path / "saved"), "--save-interval", "100", "--exit-signal-handler")
    pretrain(SCRIPT, case.run_file, tmp_path / "whole", overrides=longer).check()
    two = ("--pipeline-model-parallel-size", "2")
    ranks = start(SCRIPT, case.run_file, tmp_path / "first", *save, *two, world=2, overrides=longer)
    log = tmp_path / "first.logs" / "rank0.log"
    wait_until(lambda: "job0 step 5/40" in log.read_text(errors="replace"), ranks)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    stopped = ranks.wait(120.0).check()
    assert "exiting program after receiving SIGTERM" in stopped.outputs[0]
    steps = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    assert 15 <= len(steps) < 150
    load = ("--load", str(tmp_path / "saved"))
    pretrain(SCRIPT, case.run_file, tmp_path / "second", *load, overrides=longer).check()
    for name in JOBS:
        whole, start_from = tiny.adapter(tmp_path / "whole", name), tiny.read(case.folder / "init" / name)
        error = tiny.update_error(tiny.adapter(tmp_path / "second", name), whole, start_from)
        assert measured(error) <= TOLERANCE
        assert len(tiny.losses(tmp_path / "second", name)) == len(tiny.losses(tmp_path / "whole", name))


def test_in_bfloat16_the_script_is_as_near_to_fp32_as_the_command_is(tmp_path, measured):
    folder = tmp_path / "run"
    tiny.write_base(folder / "base")
    jobs = [tiny.job(folder, "a", seed=1), tiny.job(folder, "b", r=8, batch=2, steps=6, seed=2)]
    run_file, sixteen = tiny.write_run(folder, jobs), "base_model.dtype=bfloat16"
    launch.train(run_file, f"checkpoint.save={tmp_path / 'exact'}")
    launch.train(run_file, f"checkpoint.save={tmp_path / 'command'}", sixteen)
    pretrain(SCRIPT, run_file, tmp_path / "script", "--bf16", overrides=(sixteen,)).check()
    for name in ("a", "b"):
        exact, start = tiny.adapter(tmp_path / "exact", name), tiny.read(folder / "init" / name)
        ours, theirs = (
            tiny.update_error(tiny.adapter(tmp_path / out, name), exact, start) for out in ("script", "command")
        )
        assert measured(ours) < 1.5 * theirs
        losses = zip(tiny.losses(tmp_path / "script", name), tiny.losses(tmp_path / "exact", name), strict=True)
        assert max(abs(a - b) for a, b in losses) < 0.02


def test_what_an_option_forbids_ends_with_one_line_and_writes_nothing(case, tmp_path):
    finished = pretrain(SCRIPT, case.run_file, tmp_path / "out", "--fp8-format", "hybrid")
    assert finished.statuses == (2,)
    error = [line for line in finished.outputs[0].splitlines() if line.startswith("lorafusion-megatron: error: ")]
    assert error == [
        "lorafusion-megatron: error: --fp8-format: got hybrid; the adapters' products have no fp8 form; use --bf16"
    ]
    assert not (tmp_path / "out").exists()


def test_megatron_stays_as_it_is_without_a_run_file_and_is_put_back_after_one(case, tmp_path):
    words = model_words(case.run_file)
    run_words = ["--lorafusion-config", str(case.run_file)]
    ranks = launch.Ranks(enabling_and_disabling, (words, run_words), world=1, folder=tmp_path)
    ranks.wait(120.0).check()


def test_the_tutorial_works_as_it_stands(tmp_path):
    page = (ROOT / "docs" / "tutorials" / "megatron_lm.md").read_text()
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    base = tmp_path / "models" / "SmolLM2-135M-Instruct"
    write_tokenizer(write_model(base, max_position_embeddings=2048))
    marked = page.split("::test_the_tutorial_works_as_it_stands -->\n```console\n$ ")[1:]
    printing, training = (block.splitlines()[0] for block in marked)
    done = subprocess.run(
        [sys.executable, *shlex.split(printing)[1:]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "--num-layers 4 --hidden-size 16" in done.stdout
    assert f"$({printing})" in training
    words = shlex.split(training.replace(f"$({printing})", done.stdout))
    assert words[:4] == ["torchrun", "--standalone", "--nproc-per-node", "2"]
    ranks = launch.Ranks(run_in_folder, (str(tmp_path), words[4], words[5:]), world=2, folder=tmp_path / "logs")
    ranks.wait(180.0).check()
    for name in ("summaries", "grammar"):
        assert (tmp_path / "runs" / "quickstart" / name / "adapter_model.safetensors").is_file()
    assert (tmp_path / "runs" / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "1"


def test_the_tutorial_shows_the_added_lines_and_every_refused_option():
    page = (ROOT / "docs" / "tutorials" / "megatron_lm.md").read_text()
    added = re.findall(r"^\+(.*)$", page, re.MULTILINE)
    assert [line.strip() for line in added] == [change[2:].strip() for change in _changes()]
    table = page.split("## What is refused")[1].split("## ")[0]
    rows = dict(re.findall(r"^\| (`--.*?`) \| (.*?) \|$", table, re.MULTILINE))
    shown = {option: rule for options, rule in rows.items() for option in re.findall(r"`(--[^`]+)`", options)}
    assert shown == {refusal.option: refusal.rule for refusal in REFUSALS}


def test_the_script_is_the_ordinary_one_and_three_added_lines():
    assert _changes() == [
        "+ from lorafusion_megatron.integrations import megatron_lm as lorafusion",
        "+     lorafusion.add_arguments(parser)",
        "+     lorafusion.enable(args)",
    ]


def _changes() -> list[str]:
    """Lines of code that the ordinary script and ours don't share."""
    ordinary = (ROOT / "scripts" / "examples" / "pretrain_gpt.py").read_text().split('"""', 2)[2].splitlines()
    ours = SCRIPT.read_text().split('"""', 2)[2].splitlines()
    return [line for line in difflib.ndiff(ordinary, ours) if line[0] in "+-" and line[2:].strip()]


def _norm_of_base(case) -> float:
    """Norm over all weights of the base model, each counted once."""
    weights = load_file(case.folder / "base" / "model.safetensors").values()
    return sum(float(weight.double().square().sum()) for weight in weights) ** 0.5


def _microbatches(out) -> int:
    """Microbatches of all windows of a run, over all replicas, from its timeline and its replicas."""
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    first = [event for event in events if event.get("cat") == "forward" and event["pid"] == 0]
    positions = sum(event["args"]["chunk"] == 0 for event in first)
    replicas = json.loads((out / "state" / "00000001" / "manifest.json").read_text())["shape"]["replicas"]
    return positions * replicas


def wait_until(true, ranks, seconds=60.0):
    """Wait for something that running ranks bring about."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in ranks.processes)
        time.sleep(0.05)


def test_a_last_validation_and_a_request_that_wait_at_the_start_are_dealt_with(case, tmp_path):
    jobs = yaml.safe_load(case.run_file.read_text())["jobs"]
    rows = jobs[0]["dataset"]["path"]
    lengths = tuple(f"jobs[{index}].train.train_iters=4" for index in range(3))  # a checkpoint comes right at their end
    validated = (f"jobs[0].eval.path={rows}", "jobs[0].eval.interval=1000", *lengths)  # after the last step alone
    saves = (f"checkpoint.save={tmp_path / 'whole'}", "checkpoint.save_interval=1", "checkpoint.keep=99")
    launch.train(case.run_file, *validated, *saves)

    def waits(state) -> bool:
        records = json.loads((state / "manifest.json").read_text())["jobs"]
        return all(job["applied"] == job["num_steps"] and not job["evals"] for job in records)

    (state, *_) = (state for state in sorted((tmp_path / "whole" / "state").iterdir()) if waits(state))
    out = tmp_path / "out"
    shutil.copytree(state, out / "state" / state.name)
    (out / "inbox").mkdir()
    late = jobs[1] | {"name": "late", "train": {"global_batch_size": 2, "train_iters": 3}}
    (out / "inbox" / "late.yaml").write_text(yaml.safe_dump(late))
    finished = pretrain(SCRIPT, case.run_file, out, overrides=validated).check()
    assert "every job has ended already" not in finished.outputs[0]
    (best,) = json.loads((out / "job0" / "evals.json").read_text())
    wanted = json.loads((tmp_path / "whole" / "job0" / "evals.json").read_text())[0]
    # Of another program: where its tensors lie in memory may change the last bit of a sum.
    assert best == {"step": wanted["step"], "loss": pytest.approx(wanted["loss"], rel=1e-6)}
    assert tiny.same_bits(tiny.adapter(out / "job0", "best"), tiny.adapter(tmp_path / "whole" / "job0", "best"))
    assert len(tiny.losses(out, "late")) == 3
