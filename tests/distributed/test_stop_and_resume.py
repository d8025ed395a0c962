"""A run that is stopped or killed ends, after a resume, with the bits of an undisturbed one."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.config.job import RESERVED
from lorafusion_megatron.training.signals import EXIT_STOPPED
from tests import launch, tiny
from tests.distributed import hooks

STEPS = 24
PP2 = ["model.pipeline_model_parallel_size=2"]
TOPOLOGIES = {
    "PP2": (2, PP2),
    "TP2 SP": (2, ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]),
    "DP2": (2, []),
    "PP2 interleaved": (2, [*PP2, "model.virtual_pipeline_model_parallel_size=2"]),
}
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    """Three jobs with dropout that end at different steps; a checkpoint every five steps of an average job."""
    folder = tmp_path_factory.mktemp("resume")
    tiny.write_base(folder / "base")
    jobs = [
        tiny.job(folder, "a", steps=STEPS, batch=4, seed=1, lora_dropout=0.1),
        tiny.job(folder, "b", steps=STEPS - 6, batch=2, r=8, seed=2, target_modules=["q_proj", "v_proj"]),
        tiny.job(folder, "c", steps=STEPS, batch=3, r=2, seed=3, lora_dropout=0.2),
    ]
    jobs[0]["dataset"]["shuffle"] = True
    path = tiny.write_run(folder, jobs)
    return path


@pytest.fixture(scope="module")
def undisturbed(run_file, tmp_path_factory):
    """Trains a topology once; returns the run's folder."""
    done: dict[str, Path] = {}

    def train(topology: str) -> Path:
        if topology not in done:
            world, words = TOPOLOGIES[topology]
            done[topology] = tmp_path_factory.mktemp("undisturbed") / "out"
            launch.train(
                run_file, *words, "checkpoint.save_interval=5", f"checkpoint.save={done[topology]}", world=world
            )
        return done[topology]

    return train


def start(run_file: Path, out: Path, topology: str, *more: str) -> launch.Ranks:
    """Start the ranks of a run without waiting for them."""
    world, words = TOPOLOGIES[topology]
    arguments = ["train", str(run_file), *words, "checkpoint.save_interval=5", f"checkpoint.save={out}", *more]
    return launch.Ranks(launch.command, (arguments,), world=world, folder=out.with_name(f"{out.name}.logs"))


def wait_for_lines(out: Path, count: int, seconds: float = 60.0) -> None:
    """Wait until ``count`` steps of any job are in the metrics."""
    deadline = time.monotonic() + seconds
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"no {count} steps within {seconds} s"
        time.sleep(0.005)


def check_same(out: Path, wanted: Path) -> None:
    """Same adapters, losses and metrics: every step of every job once; no file but reserved ones."""
    for name in NAMES:
        assert tiny.same_bits(tiny.adapter(out, name), tiny.adapter(wanted, name)), name
        assert tiny.losses(out, name) == tiny.losses(wanted, name), name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name, steps in zip(NAMES, (STEPS, STEPS - 6, STEPS), strict=True):
        assert [line["step"] for line in lines if line["job"] == name] == list(range(1, steps + 1)), name
    # A kill before the first checkpoint leaves results that move aside.
    found = {path.name for path in out.iterdir() if not path.name.startswith("earlier-")}
    assert found - set(NAMES) <= set(RESERVED)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_signal_to_one_rank_stops_all_and_a_resume_goes_on_bitwise(topology, run_file, undisturbed, tmp_path):
    wanted, out = undisturbed(topology), tmp_path / "out"
    ranks = start(run_file, out, topology)
    wait_for_lines(out, 12)
    os.kill(ranks.processes[-1].pid, signal.SIGUSR1)
    finished = ranks.wait(60.0)
    assert finished.statuses == (EXIT_STOPPED,) * len(finished.statuses), finished.outputs[0][-2000:]
    assert "the state is saved" in finished.outputs[0]
    done = len((out / "metrics.jsonl").read_text().splitlines())
    assert 12 <= done < 3 * STEPS - 6
    again = start(run_file, out, topology).wait(90.0).check()
    assert "resuming from" in again.outputs[0]
    check_same(out, wanted)


@pytest.mark.parametrize("lines", [1, 17, 40])
def test_a_killed_rank_ends_the_others_and_a_resume_goes_on_bitwise(lines, run_file, undisturbed, tmp_path):
    wanted, out = undisturbed("PP2"), tmp_path / "out"
    ranks = start(run_file, out, "PP2")
    wait_for_lines(out, lines)
    os.kill(ranks.processes[lines % 2].pid, signal.SIGKILL)
    finished = ranks.wait(60.0)
    assert finished.statuses[lines % 2] == -signal.SIGKILL
    assert finished.statuses[1 - lines % 2] not in (0, EXIT_STOPPED)
    start(run_file, out, "PP2").wait(90.0).check()
    check_same(out, wanted)


def test_a_second_signal_is_obeyed_at_once(run_file, tmp_path):
    out = tmp_path / "out"
    ranks = start(run_file, out, "PP2", "runtime.distributed_timeout_minutes=0.2")
    wait_for_lines(out, 3)
    # Rank 1 is held, so that rank 0 can't stop in order; its second signal, later than a launcher's echo, ends it.
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    try:
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        time.sleep(2.3)
        assert ranks.processes[0].is_alive()
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        ranks.processes[0].join(5.0)
        assert ranks.processes[0].exitcode == 128 + signal.SIGTERM
    finally:
        ranks.processes[1].kill()
        ranks.wait(10.0)


@pytest.mark.parametrize("topology", ["TP2 SP", "DP2"])
def test_a_checkpoint_of_two_stages_goes_on_under_another_topology(topology, run_file, undisturbed, tmp_path):
    wanted, out = undisturbed("PP2"), tmp_path / "out"
    ranks = start(run_file, out, "PP2")
    wait_for_lines(out, 20)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert set(ranks.wait(60.0).statuses) == {EXIT_STOPPED}
    again = start(run_file, out, topology).wait(90.0).check()
    assert "another shape" in again.outputs[0]
    for name in NAMES:
        first = tiny.read(run_file.parent / "init" / name)
        assert tiny.update_error(tiny.adapter(out, name), tiny.adapter(wanted, name), first) < 1e-3, name
        assert len(tiny.losses(out, name)) == len(tiny.losses(wanted, name))


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "missing file", "missing manifest", "bad manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, run_file, undisturbed, tmp_path):
    wanted, out = undisturbed("PP2"), tmp_path / "out"
    ranks = start(run_file, out, "PP2")
    wait_for_lines(out, 40)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    ranks.wait(60.0)
    states = sorted(path for path in (out / "state").iterdir() if path.name.isdigit())
    assert len(states) == 2
    newest, file = states[-1], states[-1] / "a.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "corrupted":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(bytes(content))
    elif damage == "missing file":
        file.unlink()
    elif damage == "missing manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text((newest / "manifest.json").read_text()[:50])
    again = start(run_file, out, "PP2").wait(90.0).check()
    assert f"{newest} is passed over" in again.outputs[0]
    assert f"resuming from {states[0]}" in again.outputs[0]
    check_same(out, wanted)


def test_what_a_kill_left_of_a_checkpoint_being_written_is_ignored_and_removed(run_file, undisturbed, tmp_path):
    wanted, out = undisturbed("PP2"), tmp_path / "out"
    ranks = start(run_file, out, "PP2")
    wait_for_lines(out, 30)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    ranks.wait(60.0)
    states = sorted(path for path in (out / "state").iterdir())
    unfinished = out / "state" / ".00000099.1"
    shutil.copytree(states[-1], unfinished)
    start(run_file, out, "PP2").wait(90.0).check()
    assert not unfinished.exists()
    check_same(out, wanted)


@pytest.mark.parametrize("topology", ["PP2", "DP2"])
def test_a_done_step_without_a_finite_loss_does_not_spoil_the_next_one_when_it_runs_again(topology, tmp_path):
    """Its microbatches run again with weight 0 for the sake of other jobs, and 0 times NaN is NaN."""
    world, words = TOPOLOGIES[topology]
    tiny.write_base(tmp_path / "base")
    # Steps of several microbatches, so that those of different jobs lie across each other.
    jobs = [tiny.job(tmp_path, name, steps=14, batch=9 + i, seed=i, lora_dropout=0.1) for i, name in enumerate(NAMES)]
    run_file = tiny.write_run(tmp_path, jobs)

    def begin(out: Path, logs: str) -> launch.Ranks:
        arguments = [str(run_file), *words, f"checkpoint.save={out}"]
        return launch.Ranks(
            hooks.train_on_rows_without_a_number, (arguments,), world=world, folder=tmp_path / f"{out.name}.{logs}"
        )

    begin(tmp_path / "wanted", "logs").wait(90.0).check()
    again_run = 0
    for lines in (6, 18):
        out = tmp_path / f"out{lines}"
        ranks = begin(out, "logs")
        wait_for_lines(out, lines)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        assert set(ranks.wait(60.0).statuses) == {EXIT_STOPPED}
        again = begin(out, "again").wait(90.0).check()
        again_run += sum("runs again" in output for output in again.outputs)
        for name in NAMES:
            assert tiny.same_bits(tiny.adapter(out, name), tiny.adapter(tmp_path / "wanted", name)), name
            assert tiny.losses(out, name) == tiny.losses(tmp_path / "wanted", name), name
    assert again_run, "no stop fell where a done step runs again"


@pytest.mark.parametrize("words", [(), ("checkpoint.save_interval=50",)], ids=["at the end", "by interval"])
def test_a_stop_leaves_the_adapters_as_they_are_then(tmp_path, words):
    """They can be exported, merged and looked at, and are not among the kept steps."""
    run_file, out = tiny.tiny_run(tmp_path, max_window_microbatches=6), tmp_path / "out"
    words = (str(run_file), *words, *(f"jobs.{name}.train.train_iters=400" for name in ("first", "second")))
    ranks = launch.Ranks(launch.command, (["train", *words],), world=1, folder=tmp_path / "logs")
    wait_for_lines(out, 20)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert ranks.wait(60.0).statuses == (EXIT_STOPPED,)
    state = max((out / "state").iterdir())
    for job in json.loads((state / "manifest.json").read_text())["jobs"]:
        assert job["applied"] % 50
        assert len(tiny.losses(out, job["name"])) == job["applied"]
        assert not (out / job["name"] / f"step_{job['applied']}").exists()
        masters = load_file(state / f"{job['name']}.safetensors")
        kept = sorted(value.double().norm().item() for value in tiny.adapter(out, job["name"]).values())
        held = sorted(value.double().norm().item() for name, value in masters.items() if "master" in name)
        assert kept == pytest.approx(held, rel=1e-2), "masters are not rounded to the model's type"
    assert main(["job", "cancel", str(out), "first"]) == 0
    launch.train(*words)
    jobs = json.loads((out / "status.json").read_text())["jobs"]
    assert {job["name"]: job["status"] for job in jobs} == {"first": "cancelled", "second": "finished"}
