"""Jobs that come, pause and leave while a run goes on, bad jobs beside good ones, validation, full disks."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.training.signals import EXIT_STOPPED
from tests import launch, tiny
from tests.distributed.test_stop_and_resume import wait_for_lines

PP2 = ["model.pipeline_model_parallel_size=2"]
SMALL_WINDOWS = ["runtime.max_window_microbatches=6"]
NO_SPACE = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
"""What safetensors raises on a full disk; no OSError."""


def make(folder: Path, steps: int = 12, **runtime) -> Path:
    """Two jobs, and a third one's file beside the run."""
    tiny.write_base(folder / "base")
    jobs = [
        tiny.job(folder, "a", steps=steps, batch=4, seed=1, lora_dropout=0.1),
        tiny.job(folder, "b", steps=steps, batch=3, r=8, seed=2),
    ]
    late = tiny.job(folder, "late", steps=5, batch=2, r=2, seed=3, lora_dropout=0.1)
    (folder / "late.yaml").write_text(yaml.safe_dump(late))
    return tiny.write_run(folder, jobs, **runtime)


def alone(folder: Path, name: str, steps_of: Path | None = None) -> Path:
    """Train one job of ``folder`` by itself; the run's folder."""
    jobs = {job["name"]: job for job in yaml.safe_load((folder / "run.yaml").read_text())["jobs"]}
    jobs["late"] = yaml.safe_load((folder / "late.yaml").read_text())
    run = tiny.write_run(folder / "alone" / name, [jobs[name]], base=folder / "base")
    launch.train(run)
    return folder / "alone" / name / "out"


def error(folder: Path, out: Path, name: str) -> float:
    """Update error of a job against the same job trained alone."""
    start = tiny.read(folder / "init" / name)
    return tiny.update_error(tiny.adapter(out, name), tiny.adapter(alone(folder, name), name), start)


def statuses(out: Path) -> dict[str, str]:
    """Name of each job -> its status in the run's folder."""
    return {job["name"]: job["status"] for job in json.loads((out / "status.json").read_text())["jobs"]}


def background(run_file: Path, *words: str) -> launch.Ranks:
    """Start a run of two stages."""
    out = run_file.parent / "out"
    arguments = ["train", str(run_file), *PP2, *SMALL_WINDOWS, *words]
    return launch.Ranks(launch.command, (arguments,), world=2, folder=out.with_name("out.logs"))


def test_a_job_joins_one_is_cancelled_and_the_rest_equals_a_run_of_its_own(tmp_path, capsys):
    run_file, out = make(tmp_path, steps=20), tmp_path / "out"
    ranks = background(run_file)
    wait_for_lines(out, 3)
    assert main(["job", "add", str(out), str(tmp_path / "late.yaml")]) == 0
    assert main(["job", "cancel", str(out), "b"]) == 0
    finished = ranks.wait(90.0).check()
    assert "late joins: 5 steps" in finished.outputs[0]
    assert statuses(out) == {"a": "finished", "b": "cancelled", "late": "finished"}
    assert error(tmp_path, out, "a") < 1e-3
    assert error(tmp_path, out, "late") < 1e-3
    done = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    cancelled = [line["step"] for line in done if line["job"] == "b"]
    assert cancelled == list(range(1, len(cancelled) + 1))
    assert len(cancelled) < 20
    assert len(tiny.losses(out, "b")) == len(cancelled)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert {(event["op"], event["name"]) for event in events} == {("add", "late"), ("cancel", "b")}
    assert not list((out / "inbox").iterdir())


def test_large_data_is_read_once_for_all_ranks_jobs_and_starts_and_trains_the_same(tmp_path):
    run_file, out = make(tmp_path, steps=20), tmp_path / "out"
    blank = (" " * 999 + "\n") * 9000  # lines that hold nothing, so that these files count as large
    for path in (tmp_path / "data").glob("*.jsonl"):
        path.write_text(path.read_text() + blank)
    ranks = background(run_file, "checkpoint.save_interval=2")
    wait_for_lines(out, 3)
    kept = {path: path.stat().st_ino for path in (out / "tokenized").glob("*/ids.npy")}
    assert len(kept) == 2
    assert main(["job", "add", str(out), str(tmp_path / "late.yaml")]) == 0
    deadline = time.monotonic() + 60
    while len(list((out / "tokenized").glob("*/ids.npy"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert set(ranks.wait(60.0).statuses) == {EXIT_STOPPED}
    background(run_file, "checkpoint.save_interval=2").wait(90.0).check()
    assert {path: path.stat().st_ino for path in kept} == kept, "not read again"
    assert statuses(out) == {"a": "finished", "b": "finished", "late": "finished"}
    for path in (tmp_path / "data").glob("*.jsonl"):
        path.write_text(path.read_text().strip())
    for name in ("a", "b", "late"):
        assert error(tmp_path, out, name) < 1e-3


def test_a_resume_replays_a_job_that_joined_after_the_checkpoint(tmp_path):
    run_file, out = make(tmp_path, steps=20), tmp_path / "out"
    ranks = background(run_file, "checkpoint.save_interval=2")
    wait_for_lines(out, 4)
    main(["job", "add", str(out), str(tmp_path / "late.yaml")])
    wait_for_lines(out, 26)
    assert any('"late"' in line for line in (out / "metrics.jsonl").read_text().splitlines())
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    ranks.wait(60.0)
    background(run_file, "checkpoint.save_interval=2").wait(90.0).check()
    assert statuses(out) == {"a": "finished", "b": "finished", "late": "finished"}
    assert error(tmp_path, out, "late") < 1e-3
    assert len(tiny.losses(out, "late")) == 5


def test_a_job_that_joined_and_whose_data_is_away_is_paused_and_goes_on_when_it_is_back(tmp_path):
    run_file, out = make(tmp_path, steps=60), tmp_path / "out"
    ranks = background(run_file, "checkpoint.save_interval=2")
    wait_for_lines(out, 4)
    late = yaml.safe_load((tmp_path / "late.yaml").read_text())
    late["train"]["train_iters"] = 60
    late["eval"] = {"path": late["dataset"]["path"], "interval": 60}
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(late))
    main(["job", "add", str(out), str(tmp_path / "late.yaml")])
    wait_for_lines(out, 30)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert set(ranks.wait(60.0).statuses) == {EXIT_STOPPED}
    assert statuses(out)["late"] == "running"
    data = tmp_path / "data" / "late.jsonl"
    away = data.rename(tmp_path / "away")
    finished = background(run_file).wait(90.0).check()
    assert statuses(out) == {"a": "finished", "b": "finished", "late": "paused"}
    assert "late is paused at step" in finished.outputs[0]
    assert "the others go on: jobs.late.dataset.path: " in finished.outputs[0]
    assert main(["job", "resume", str(out), "late"]) == 0
    finished = background(run_file).wait(90.0).check()  # not back yet
    assert statuses(out)["late"] == "paused"
    away.rename(data)
    assert main(["job", "resume", str(out), "late"]) == 0
    finished = background(run_file).wait(90.0).check()
    assert statuses(out)["late"] == "finished"
    assert len(tiny.losses(out, "late")) == 60
    assert (out / "late" / "best" / "adapter_model.safetensors").is_file()
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(late))
    assert error(tmp_path, out, "late") < 1e-3


def test_an_accepted_job_outlives_a_run_that_was_killed_before_its_first_checkpoint(tmp_path):
    run_file, out = make(tmp_path, steps=40), tmp_path / "out"
    ranks = background(run_file)
    wait_for_lines(out, 3)
    main(["job", "add", str(out), str(tmp_path / "late.yaml")])
    deadline = time.monotonic() + 60
    while not (out / "events.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    ranks.wait(60.0)
    assert not (out / "state").exists()
    background(run_file).wait(90.0).check()
    assert statuses(out) == {"a": "finished", "b": "finished", "late": "finished"}
    assert error(tmp_path, out, "late") < 1e-3


def test_a_paused_job_goes_on_where_it_was(tmp_path):
    run_file, out = make(tmp_path, steps=16), tmp_path / "out"
    ranks = background(run_file)
    wait_for_lines(out, 3)
    main(["job", "pause", str(out), "b"])
    finished = ranks.wait(90.0).check()
    assert statuses(out) == {"a": "finished", "b": "paused"}
    assert f"to go on, lorafusion-megatron job resume {out} b and the same command again" in finished.outputs[0]
    assert main(["job", "resume", str(out), "b"]) == 0
    background(run_file).wait(90.0).check()
    assert statuses(out) == {"a": "finished", "b": "finished"}
    assert error(tmp_path, out, "b") < 1e-3
    assert len(tiny.losses(out, "b")) == 16


def test_a_request_that_can_not_be_met_is_refused_and_the_run_goes_on(tmp_path):
    run_file, out = make(tmp_path), tmp_path / "out"
    (out / "inbox").mkdir(parents=True)
    late = yaml.safe_load((tmp_path / "late.yaml").read_text())
    bad = {
        "same.yaml": late | {"name": "A"},
        "rank.yaml": late | {"peft": late["peft"] | {"r": 0}},
        "data.yaml": late | {"dataset": {"path": "/nowhere.jsonl"}},
        "op.yaml": {"op": "resume", "name": "a"},
        "who.yaml": {"op": "cancel", "name": "nobody"},
        "outside.yaml": late | {"name": "../outside"},
    }
    for name, value in bad.items():
        (out / "inbox" / name).write_text(yaml.safe_dump(value))
    (out / "inbox" / "no.yaml").write_text("{")
    finished = launch.train(run_file, f"checkpoint.save={out}")
    for name in (*bad, "no.yaml"):
        assert f"request {name} is refused: " in finished.outputs[0], name
        assert (out / "inbox" / f"{name}.refused").is_file()
    assert statuses(out) == {"a": "finished", "b": "finished"}


def test_a_job_whose_name_is_a_number_can_be_paused(tmp_path):
    tiny.write_base(tmp_path / "base")
    jobs = [tiny.job(tmp_path, name, steps=16, batch=3, seed=1) for name in ("123", "b")]
    run_file, out = tiny.write_run(tmp_path, jobs), tmp_path / "out"
    ranks = background(run_file)
    wait_for_lines(out, 3)
    main(["job", "pause", str(out), "123"])
    ranks.wait(90.0).check()
    assert statuses(out) == {"123": "paused", "b": "finished"}


def spoil(adapter: Path) -> None:
    """Make every product with this adapter overflow; each of its values is finite."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name: torch.full_like(tensor, 3e38) for name, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_a_job_without_a_finite_gradient_is_stopped_and_the_others_keep_every_bit(tmp_path):
    run_file = make(tmp_path)
    launch.train(run_file, *PP2, f"checkpoint.save={tmp_path / 'good'}", world=2)
    spoil(tmp_path / "init" / "a")
    bad = launch.train(run_file, *PP2, f"checkpoint.save={tmp_path / 'bad'}", world=2)
    assert tiny.same_bits(tiny.adapter(tmp_path / "bad", "b"), tiny.adapter(tmp_path / "good", "b"))
    assert tiny.losses(tmp_path / "bad", "b") == tiny.losses(tmp_path / "good", "b")
    assert statuses(tmp_path / "bad") == {"a": "stopped", "b": "finished"}
    assert "a is stopped after step" in bad.outputs[0]
    assert bad.outputs[0].count("SKIPPED") >= 3
    # Its last good adapter is the one that it began with.
    assert tiny.same_bits(tiny.adapter(tmp_path / "bad", "a"), tiny.read(tmp_path / "init" / "a"))


def test_a_resume_within_the_window_that_stopped_a_job_goes_on_and_keeps_its_adapter(tmp_path):
    run_file, out = make(tmp_path, steps=40), tmp_path / "out"
    spoil(tmp_path / "init" / "a")
    words = [str(run_file), *PP2, "runtime.max_window_microbatches=400"]
    ranks = launch.Ranks(launch.command, (["train", *words],), world=2, folder=tmp_path / "logs")
    wait_for_lines(out, 12)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert set(ranks.wait(60.0).statuses) == {EXIT_STOPPED}
    launch.Ranks(launch.command, (["train", *words],), world=2, folder=tmp_path / "logs2").wait(90.0).check()
    assert statuses(out) == {"a": "stopped", "b": "finished"}
    assert error(tmp_path, out, "b") < 1e-3
    assert tiny.same_bits(tiny.adapter(out, "a"), tiny.read(tmp_path / "init" / "a"))


def test_checkpoints_come_although_windows_are_short(tmp_path):
    run_file, out = make(tmp_path, steps=40), tmp_path / "out"
    ranks = background(run_file, "checkpoint.save_interval=8", "checkpoint.keep=9")
    ranks.wait(90.0).check()
    assert len(list((out / "state").glob("0*"))) >= 80 // 16


@pytest.mark.parametrize("change", ["shorter", "longer", "data"])
def test_a_resume_with_other_data_or_length_plans_the_rest_of_the_window_anew(change, tmp_path):
    run_file, out = make(tmp_path, steps=30), tmp_path / "out"
    words = ["train", str(run_file), "runtime.max_window_microbatches=400"]
    ranks = launch.Ranks(launch.command, (words,), world=1, folder=tmp_path / "logs")
    wait_for_lines(out, 8)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert set(ranks.wait(60.0).statuses) == {EXIT_STOPPED}
    if change == "data":
        path = Path(yaml.safe_load(run_file.read_text())["jobs"][0]["dataset"]["path"])
        path = path if path.is_absolute() else tmp_path / path
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    steps = {"shorter": 20, "longer": 33, "data": 30}[change]
    words.append(f"jobs.a.train.train_iters={steps}")
    again = launch.Ranks(launch.command, (words,), world=1, folder=tmp_path / "logs2").wait(90.0).check()
    assert ("the rest of its window is planned anew" in again.outputs[0]) == (change != "longer")
    assert statuses(out) == {"a": "finished", "b": "finished"}
    assert (len(tiny.losses(out, "a")), len(tiny.losses(out, "b"))) == (steps, 30)


def test_validation_is_the_training_loss_of_the_next_step_without_dropout(tmp_path):
    """With all rows in every global batch and no dropout, step t+1 trains on the loss that validation at t has."""
    tiny.write_base(tmp_path / "base")
    plain = tiny.job(tmp_path, "plain", rows=7, batch=7, steps=6, seed=1)
    noisy = tiny.job(tmp_path, "noisy", rows=7, batch=7, steps=6, seed=1, lora_dropout=0.5, optimizer={"lr": 1e-12})
    for job in (plain, noisy):
        job["eval"] = {"path": job["dataset"]["path"], "interval": 2}
        job["scheduler"] = {"lr_decay_style": "constant"}
    run_file = tiny.write_run(tmp_path, [plain, noisy])
    interleaved = [*PP2, "model.virtual_pipeline_model_parallel_size=2"]
    split = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]
    for number, (world, words) in enumerate([(1, []), (2, PP2), (2, []), (2, interleaved), (2, split)]):
        out = tmp_path / f"out{number}"
        launch.train(run_file, *words, f"checkpoint.save={out}", world=world)
        evals = {e["step"]: e["loss"] for e in json.loads((out / "plain" / "evals.json").read_text())}
        assert list(evals) == [2, 4, 6]
        losses = tiny.losses(out, "plain")
        assert evals[2] == pytest.approx(losses[2], rel=1e-5)
        assert evals[4] == pytest.approx(losses[4], rel=1e-5)
        # The noisy job's adapter does not move: its validation, without dropout, is the plain job's first loss.
        still = json.loads((out / "noisy" / "evals.json").read_text())[0]["loss"]
        assert still == pytest.approx(losses[0], rel=1e-5)
        assert abs(tiny.losses(out, "noisy")[0] - losses[0]) > 1e-4
        best = min(evals, key=evals.get)
        kept = load_file(out / "plain" / "best" / "adapter_model.safetensors")
        assert tiny.same_bits(kept, tiny.adapter(out, "plain")) == (best == 6)


def test_a_job_out_of_patience_ends_early_with_its_best_adapter_kept(tmp_path):
    tiny.write_base(tmp_path / "base")
    # Steps that change nothing: no loss is ever better than the first, whatever the machine's arithmetic.
    job = tiny.job(tmp_path, "still", rows=7, batch=7, steps=30, seed=1, optimizer={"lr": 1e-30})
    job["scheduler"] = {"lr_decay_style": "constant"}
    job["eval"] = {"path": job["dataset"]["path"], "interval": 1, "patience": 2}
    finished = launch.train(tiny.write_run(tmp_path, [job]))
    out = tmp_path / "out"
    evals = json.loads((out / "still" / "evals.json").read_text())
    assert [e["step"] for e in evals] == [1, 2, 3]
    assert "ends early" in finished.outputs[0]
    assert len(tiny.losses(out, "still")) == 3
    assert (out / "still" / "best" / "adapter_model.safetensors").is_file()
    launch.train(tmp_path / "run.yaml")  # done
    longer = launch.Ranks(
        launch.command,
        (["train", str(tmp_path / "run.yaml"), "jobs.still.train.train_iters=60"],),
        world=1,
        folder=tmp_path / "longer",
    ).wait()
    assert longer.statuses == (2,)
    assert "60 steps for still, which ended after 3; " in longer.outputs[0]


def train_on_a_full_disk(words: list[str]) -> int:
    """Train while the second checkpoint and the second adapter of job a meet a full disk."""
    from lorafusion_megatron.models import tensors as module

    counts, save = {"adapter": 0, "state": 0}, module.save_file

    def failing(tensors, path, *args, **kwargs):
        kind = "adapter" if Path(path).name == "adapter_model.safetensors" else "state"
        counts[kind] += 1
        if counts[kind] in (3, 4):
            Path(path).write_bytes(b"half")
            raise NO_SPACE
        save(tensors, path, *args, **kwargs)

    module.save_file = failing
    return launch.command(["train", *words])


def test_a_full_disk_during_a_save_is_told_and_the_run_goes_on(tmp_path):
    run_file = make(tmp_path)
    wanted = tmp_path / "wanted"
    launch.train(run_file, "checkpoint.save_interval=3", f"checkpoint.save={wanted}")
    out = tmp_path / "out"
    words = [str(run_file), "checkpoint.save_interval=3"]
    finished = launch.Ranks(train_on_a_full_disk, (words,), world=1, folder=tmp_path / "logs").wait(90.0).check()
    assert "a checkpoint could not be saved" in finished.outputs[0]
    assert "No space left on device" in finished.outputs[0]
    assert "adapter of step" in finished.outputs[0]
    for name in ("a", "b"):
        assert tiny.same_bits(tiny.adapter(out, name), tiny.adapter(wanted, name))
    assert not [path for path in out.rglob(".*") if path.is_dir()], "nothing half-written is left"


def train_on_a_disk_that_hangs(words: list[str]) -> int:
    """Train while the first checkpoint is not on the disk until both jobs have done most of their steps."""
    from lorafusion_megatron.training import saver
    from lorafusion_megatron.training import state as module

    saver.PATIENCE_SECONDS = 0.0
    commit, folder = module.StateWriter.commit, Path(words[0]).parent / "out"

    def hanging(self, manifest):
        if os.environ["RANK"] == "0" and not any((folder / "state").glob("[0-9]*")):
            wait_for_lines(folder, 60)
        return commit(self, manifest)

    module.StateWriter.commit = hanging
    return launch.command(["train", *words])


@pytest.mark.parametrize("windows", [SMALL_WINDOWS, ["runtime.max_window_microbatches=500"]], ids=["many", "one"])
def test_while_a_disk_hangs_training_goes_on_and_makes_no_more_copies(windows, tmp_path):
    run_file, out = make(tmp_path, steps=40), tmp_path / "out"
    wanted = tmp_path / "wanted"
    words = [*PP2, *windows, "checkpoint.save_interval=2", "checkpoint.keep=100"]
    launch.train(run_file, *words, f"checkpoint.save={wanted}", world=2)
    hung = launch.Ranks(train_on_a_disk_that_hangs, ([str(run_file), *words],), world=2, folder=tmp_path / "logs")
    finished = hung.wait(90.0).check()
    assert "2 checkpoints or more wait to be written: the next one is left out" in finished.outputs[0]
    assert f"Check the disk under {out}" in finished.outputs[0]
    made, usual = (len(list((folder / "state").glob("[0-9]*"))) for folder in (out, wanted))
    assert 3 <= made < usual - 3
    for name in ("a", "b"):
        assert tiny.same_bits(tiny.adapter(out, name), tiny.adapter(wanted, name))


def train_without_space_for_adapters(words: list[str]) -> int:
    """Train where no adapter can ever be written."""
    from lorafusion_megatron.models import tensors as module

    save = module.save_file

    def failing(tensors, path, *args, **kwargs):
        if Path(path).name == "adapter_model.safetensors":
            raise NO_SPACE
        save(tensors, path, *args, **kwargs)

    module.save_file = failing
    return launch.command(["train", *words])


def test_a_last_adapter_that_can_not_be_written_is_not_lost_but_written_by_the_next_start(tmp_path):
    run_file, out = make(tmp_path, steps=3), tmp_path / "out"
    wanted = tmp_path / "wanted"
    launch.train(run_file, f"checkpoint.save={wanted}")
    full = launch.Ranks(train_without_space_for_adapters, ([str(run_file)],), world=1, folder=tmp_path / "logs")
    finished = full.wait(60.0)
    assert finished.statuses == (73,)
    assert "the last adapters of a, b could not be saved" in finished.outputs[0]
    assert not (out / "a" / "adapter_model.safetensors").exists()
    assert json.loads((out / "status.json").read_text())["state"] == "stopped", "it is to be started again"
    launch.train(run_file)
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    for name in ("a", "b"):
        assert tiny.same_bits(tiny.adapter(out, name), tiny.adapter(wanted, name))


def test_a_job_that_ended_and_left_the_run_file_needs_no_data_any_more(tmp_path):
    run_file, out = make(tmp_path, steps=3), tmp_path / "out"
    launch.train(run_file)
    (tmp_path / "data" / "a.jsonl").unlink()
    late = yaml.safe_load((tmp_path / "late.yaml").read_text())
    other = tiny.write_run(tmp_path / "other", [late], base=tmp_path / "base")
    launch.train(other, f"checkpoint.save={out}")
    assert statuses(out) == {"a": "finished", "b": "finished", "late": "finished"}
    assert error(tmp_path, out, "late") < 1e-3


def test_a_run_file_that_changed_an_adapter_does_not_resume(tmp_path, capsys):
    run_file, out = make(tmp_path), tmp_path / "out"
    ranks = background(run_file)
    wait_for_lines(out, 3)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert set(ranks.wait(60.0).statuses) == {EXIT_STOPPED}
    again = background(run_file, "jobs.b.train.global_batch_size=5").wait(60.0)
    assert set(again.statuses) == {2}
    assert "jobs.b.train.global_batch_size: 5 where the checkpoint has 3" in again.outputs[0]


def test_a_run_that_ended_has_nothing_left_to_train(tmp_path):
    run_file, out = make(tmp_path, steps=3), tmp_path / "out"
    launch.train(run_file)
    before = (out / "metrics.jsonl").read_text()
    launch.train(run_file)
    assert (out / "metrics.jsonl").read_text() == before
    longer = launch.Ranks(
        launch.command, (["train", str(run_file), "jobs.a.train.train_iters=5"],), world=1, folder=tmp_path / "logs"
    ).wait(60.0)
    assert longer.statuses == (2,)
    assert "5 steps for a, which ended after 3" in longer.outputs[0]
    assert "peft.init_from" in longer.outputs[0]
