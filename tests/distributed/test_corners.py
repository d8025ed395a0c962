"""Moments at which much was lost: between windows, after a last step, where data, memory or a disk is not there."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.scheduler.trim import trim_schedule
from lorafusion_megatron.training.run import EXIT_UNSAVED
from lorafusion_megatron.training.signals import EXIT_STOPPED
from lorafusion_megatron.training.state import decode_schedule
from tests import launch, tiny
from tests.distributed.test_job_lifecycle import NO_SPACE, PP2, statuses
from tests.distributed.test_stop_and_resume import wait_for_lines


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks(folder: Path, target, *words, world=1) -> launch.Ranks:
    """Start ranks that call ``target(["train", RUN, *words])``."""
    given = ["train", str(folder / "run.yaml"), *words]
    return launch.Ranks(target, (given,), world=world, folder=folder / f"logs.{time.monotonic_ns()}")


def whole_run(folder: Path, jobs) -> list[tuple[Path, dict]]:
    """Train ``jobs`` into ``whole``; every checkpoint on the way with its manifest."""
    run_file = tiny.write_run(folder, jobs)
    launch.train(run_file, f"checkpoint.save={folder / 'whole'}", "checkpoint.save_interval=1", "checkpoint.keep=99")
    states = sorted((folder / "whole" / "state").iterdir())
    return [(state, json.loads((state / "manifest.json").read_text())) for state in states]


def go_on_from(state: Path, folder: Path) -> Path:
    """A run's folder that holds one checkpoint."""
    shutil.copytree(state, folder / "out" / "state" / state.name)
    return folder / "out"


def test_a_job_whose_last_step_was_done_before_a_stop_is_validated_after_it(tmp_path):
    tiny.write_base(tmp_path / "base")
    first = tiny.job(tmp_path, "a", steps=4, batch=4, seed=1)
    first["eval"] = {"path": first["dataset"]["path"], "interval": 4}
    states = whole_run(tmp_path, [first, tiny.job(tmp_path, "b", steps=20, batch=6, seed=2)])
    (state, *_) = (
        path
        for path, manifest in states
        if manifest["inside"] and [job["applied"] == job["num_steps"] for job in manifest["jobs"]] == [True, False]
    )
    out = go_on_from(state, tmp_path)
    launch.train(tmp_path / "run.yaml")
    for name in ("evals.json", "best/adapter_model.safetensors", "adapter_model.safetensors"):
        assert (out / "a" / name).read_bytes() == (tmp_path / "whole" / "a" / name).read_bytes()
    assert tiny.same_bits(tiny.adapter(out, "b"), tiny.adapter(tmp_path / "whole", "b"))


@pytest.mark.parametrize("change", ["left and deleted", "reordered"])
def test_a_done_job_that_a_window_would_run_again_may_have_lost_or_changed_its_data(change, tmp_path):
    tiny.write_base(tmp_path / "base")
    jobs = [
        tiny.job(tmp_path, name, steps=steps, batch=batch, rows=30, seed=batch)
        for name, steps, batch in (("a", 4, 9), ("b", 14, 10), ("c", 14, 7))
    ]

    def runs_again(path: Path, manifest) -> bool:
        if not manifest["inside"]:
            return False
        applied = {job["index"]: job["applied"] for job in manifest["jobs"]}
        rest = trim_schedule(decode_schedule(path), applied)
        return applied[0] == 4 and any(s.job == 0 for replica in rest.replicas for m in replica for s in m.samples)

    (state, *_) = (path for path, manifest in whole_run(tmp_path, jobs) if runs_again(path, manifest))
    out, data = go_on_from(state, tmp_path), Path(jobs[0]["dataset"]["path"])
    if change == "reordered":
        data.write_text("".join(line + "\n" for line in reversed(data.read_text().splitlines())))
    else:
        data.unlink()
        tiny.write_run(tmp_path, jobs[1:])
    finished = launch.train(tmp_path / "run.yaml")
    assert "the rest of its window is planned anew" in finished.outputs[0]
    for name in ("a", "b", "c"):
        start = tiny.read(tmp_path / "init" / name)
        assert tiny.update_error(tiny.adapter(out, name), tiny.adapter(tmp_path / "whole", name), start) < 1e-3


def slow_check(words: list[str]) -> int:
    """Train where large data of new jobs takes long to read."""
    from lorafusion_megatron.training import new_jobs

    new_jobs.NewJobs.check = lambda self, job: False
    return launch.command(words)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_while_a_run_waits_for_new_data_is_a_stop(rank, tmp_path):
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "a", steps=4, batch=4)])
    out = tmp_path / "out"
    (out / "inbox").mkdir(parents=True)
    (out / "inbox" / "late.yaml").write_text(yaml.safe_dump(tiny.job(tmp_path, "late", steps=5, batch=2, seed=3)))
    running = ranks(tmp_path, slow_check, *PP2, world=2)
    wait_for_lines(out, 4)
    time.sleep(1.0)
    os.kill(running.processes[rank].pid, signal.SIGTERM)
    finished = running.wait(20.0)
    assert set(finished.statuses) == {EXIT_STOPPED}
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert [path.name for path in (out / "inbox").iterdir()] == ["late.yaml"]
    launch.train(tmp_path / "run.yaml", *PP2, world=2)
    assert statuses(out) == {"a": "finished", "late": "finished"}


def slow_adapters(words: list[str]) -> int:
    """Train on a disk that takes long to write an adapter."""
    from lorafusion_megatron.training import checkpoints

    write = checkpoints.write_adapter
    checkpoints.write_adapter = lambda *given: (time.sleep(2.0), write(*given))
    return launch.command(words)


def test_a_request_that_comes_while_the_last_adapters_are_written_is_carried_out(tmp_path):
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "a", steps=4, batch=4)])
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(tiny.job(tmp_path, "late", steps=5, batch=2, seed=3)))
    running = ranks(tmp_path, slow_adapters)
    wait_for_lines(tmp_path / "out", 4)
    time.sleep(0.5)
    assert main(["job", "add", str(tmp_path / "out"), str(tmp_path / "late.yaml")]) == 0
    running.wait(60.0).check()
    assert statuses(tmp_path / "out") == {"a": "finished", "late": "finished"}


def test_a_stop_does_not_wait_for_the_end_of_a_validation(tmp_path):
    tiny.write_base(tmp_path / "base")
    job = tiny.job(tmp_path, "a", steps=20, batch=4)
    rows = tiny.write_rows_of_ids(tmp_path / "data" / "many.jsonl", 20000, seed=9)
    job["eval"] = {"path": str(rows), "interval": 10}
    run_file = tiny.write_run(tmp_path, [job])
    running = ranks(tmp_path, launch.command, *PP2, world=2)
    wait_for_lines(tmp_path / "out", 10)
    time.sleep(1.0)
    asked = time.monotonic()
    os.kill(running.processes[1].pid, signal.SIGTERM)
    finished = running.wait(60.0)
    assert set(finished.statuses) == {EXIT_STOPPED}
    assert time.monotonic() - asked < 10.0, "all of it takes half a minute"
    assert "validation loss" not in finished.outputs[0]
    tiny.write_rows_of_ids(rows, 12, seed=9)
    finished = launch.train(run_file, *PP2, world=2)
    assert [entry["step"] for entry in json.loads((tmp_path / "out" / "a" / "evals.json").read_text())] == [10, 20]


def small_gpu(words: list[str]) -> int:
    """Train where rank 1 has no room for a large adapter."""
    from lorafusion_megatron.training import rack

    make = rack.AdapterShard

    def shard(spec, *given, **more):
        if spec.rank > 64 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore.")
        return make(spec, *given, **more)

    rack.AdapterShard = shard
    return launch.command(words)


def test_a_new_job_for_which_one_rank_has_no_room_is_stopped_alone(tmp_path):
    tiny.write_base(tmp_path / "base")
    run_file = tiny.write_run(tmp_path, [tiny.job(tmp_path, "a", steps=6, batch=4)])
    out = tmp_path / "out"
    (out / "inbox").mkdir(parents=True)
    (out / "inbox" / "big.yaml").write_text(yaml.safe_dump(tiny.job(tmp_path, "big", r=128, steps=5, start=False)))
    finished = ranks(tmp_path, small_gpu, *PP2, world=2).wait(60.0).check()
    assert statuses(out) == {"a": "finished", "big": "stopped"}
    assert "no room for its adapter (CUDA out of memory. Tried to allocate 20.00 GiB.)" in finished.outputs[0]
    launch.train(run_file, f"checkpoint.save={tmp_path / 'alone'}", *PP2, world=2)
    assert tiny.same_bits(tiny.adapter(out, "a"), tiny.adapter(tmp_path / "alone", "a"))


def other_disk(words: list[str]) -> int:
    """Train where rank 1 sees other files under the same names."""
    import dataclasses

    from lorafusion_megatron.models import adapter
    from lorafusion_megatron.training import roster, row_cache

    if os.environ["RANK"] == "1":
        load, initial = row_cache.load_dataset, adapter.load_initial_adapter

        def elsewhere(path) -> Path:
            return Path(str(path).replace("/shared/", "/other/"))

        row_cache.load_dataset = lambda source, **more: load(
            dataclasses.replace(source, path=elsewhere(source.path)), **more
        )
        roster.load_initial_adapter = lambda folder, *given, **more: initial(elsewhere(folder), *given, **more)
    return launch.command(words)


@pytest.mark.parametrize("what", ["rows", "length", "adapter", "a joining job's rows"])
def test_ranks_that_read_different_files_are_told_before_they_train(what, tmp_path):
    folder = tmp_path / "shared"
    tiny.write_base(folder / "base")
    jobs = [tiny.job(folder, name, steps=4, batch=3, seed=seed) for seed, name in enumerate("ab")]
    jobs[0]["train"] = {"global_batch_size": 3, "epochs": 1.0}
    shutil.copytree(folder, tmp_path / "other")
    name = "b" if "joining" in what else "a"
    if what == "adapter":
        shutil.copytree(tmp_path / "other" / "init" / "b", tmp_path / "other" / "init" / "a", dirs_exist_ok=True)
    else:
        tiny.write_rows_of_ids(tmp_path / "other" / "data" / f"{name}.jsonl", 7 if what == "length" else 11, seed=9)
    out = folder / "out"
    if "joining" in what:
        (out / "inbox").mkdir(parents=True)
        (out / "inbox" / "b.yaml").write_text(yaml.safe_dump(jobs.pop()))
    tiny.write_run(folder, jobs)
    finished = ranks(folder, other_disk, *PP2, world=2).wait(60.0)
    text = "rank 1 has read something else than rank 0"
    if "joining" in what:
        finished.check()
        assert statuses(out) == {"a": "finished", "b": "stopped"}
        assert text in finished.outputs[0]
    else:
        assert finished.statuses == (2, 2)
        (line,) = [line for output in finished.outputs for line in output.splitlines() if "error" in line]
        assert f"jobs.a: {text}" in line


def on_another_host(words: list[str]) -> int:
    """Train where rank 1 is on a host that was started a day earlier."""
    from lorafusion_megatron.mcore import clock

    if os.environ["RANK"] == "1":
        now = time.perf_counter
        time.perf_counter = lambda: now() + 86400.0
        clock._boot = lambda: "another"
    return launch.command(words)


def test_times_of_hosts_with_different_clocks_are_times_of_one(tmp_path):
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "a", steps=6, batch=4)])
    begun = time.monotonic()
    ranks(tmp_path, on_another_host, *PP2, world=2).wait(60.0).check()
    took = time.monotonic() - begun
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {0, 1}
    assert max(event["ts"] + event["dur"] for event in spans) / 1e6 < took
    first = {pid: min(event["ts"] for event in spans if event["pid"] == pid) for pid in (0, 1)}
    assert 0 <= first[0] < first[1] < 0.5e6 * took, "stage 1 begins when stage 0 has sent something"
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert 0 < status["bubble_share"] < 1
    assert status["speed"]["tokens_per_second_per_gpu"] > 1.0


def no_room_for_states(words: list[str]) -> int:
    """Train where no checkpoint can be written."""
    from lorafusion_megatron.models import tensors as module

    save = module.save_file

    def failing(values, path, *given, **more):
        if "state" in Path(path).parts:
            raise NO_SPACE
        save(values, path, *given, **more)

    module.save_file = failing
    return launch.command(words)


def test_a_stop_whose_state_can_not_be_written_says_so_in_words_and_status(tmp_path):
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "a", steps=400, batch=4)])
    running = ranks(tmp_path, no_room_for_states)
    wait_for_lines(tmp_path / "out", 4)
    os.kill(running.processes[0].pid, signal.SIGTERM)
    finished = running.wait(60.0)
    assert finished.statuses == (EXIT_UNSAVED,)
    assert "the state could NOT be saved" in finished.outputs[0]
    assert "the state is saved" not in finished.outputs[0]
