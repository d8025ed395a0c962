"""TensorBoard and W&B: what they hold in the end is what the steps were."""

import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.config import RunConfig, load_run
from lorafusion_megatron.errors import UserError
from lorafusion_megatron.training import loggers
from lorafusion_megatron.training.loggers import Loggers, check_loggers
from lorafusion_megatron.types import StepReport
from tests.unit.tiny_inputs import make_case

KEYS = {"loss", "lr", "grad_norm", "skipped", "tokens", "label_tokens", "samples"}


def run_with(folder: Path, **logger: object) -> RunConfig:
    """A run of the jobs `first` and `second` with these logger keys."""
    case = make_case(folder)
    case.run["logger"] = {key: str(value) for key, value in logger.items()}
    return load_run(case.write())


def report(job: int, step: int, *, skipped: bool = False) -> StepReport:
    """A step whose numbers tell which one it was."""
    loss = math.nan if skipped else 10.0 * job + 1 / step
    return StepReport(job=job, step=step, loss=loss, grad_norm=2.0 * step, lr=0.1 / step, skipped=skipped)


def log_steps(opened: Loggers, *, start: int = 1, stop: int = 3) -> None:
    """Steps of both jobs by turns, and one validation."""
    for step in range(start, stop + 1):
        for job, name in enumerate(("first", "second")):
            opened.step(report(job, step), name=name, tokens=100 + step, label_tokens=50 + step, samples=3)
    opened.evaluation("first", stop, 0.25)
    opened.close()


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a ``.wandb`` file: LevelDB's log format behind a header of 7 bytes."""
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def read_wandb(folder: Path) -> tuple[list[dict[str, float]], dict[str, object], str]:
    """(logged values in order, config, run id) of the newest run under ``folder``."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # what happens at the end of a process: W&B's own process writes the rest and ends
    history, config, run_id = [], {}, ""
    for data in wandb_records(max(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns)):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            history.append({key: value for key, value in values.items() if not key.startswith("_")})
        elif kind == "run":
            run_id = record.run.run_id
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return history, config, run_id


def test_tensorboard_holds_each_jobs_steps_under_its_own_tags(tmp_path: Path) -> None:
    log_steps(Loggers(run_with(tmp_path, tensorboard_dir=tmp_path / "tb")))
    tags = read_tensorboard(tmp_path / "tb")
    assert set(tags) == {f"job/{name}/{key}" for name in ("first", "second") for key in KEYS} | {"job/first/eval_loss"}
    assert tags["job/second/loss"] == [(1, 11.0), (2, 10.5), (3, pytest.approx(10 + 1 / 3))]
    assert [value for _, value in tags["job/first/lr"]] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert tags["job/first/tokens"] == [(1, 101.0), (2, 102.0), (3, 103.0)]
    assert tags["job/first/eval_loss"] == [(3, 0.25)]


def test_a_skipped_step_is_logged_as_skipped(tmp_path: Path) -> None:
    opened = Loggers(run_with(tmp_path, tensorboard_dir=tmp_path / "tb"))
    opened.step(report(0, 1, skipped=True), name="first", tokens=1, label_tokens=1, samples=1)
    opened.close()
    opened.close()
    tags = read_tensorboard(tmp_path / "tb")
    assert tags["job/first/skipped"] == [(1, 1.0)]
    assert math.isnan(tags["job/first/loss"][0][1])


def test_wandb_offline_holds_steps_config_and_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_with(tmp_path, wandb_project="demo")
    log_steps(Loggers(run))
    history, config, first_id = read_wandb(tmp_path / "out")
    assert len(history) == 7
    assert history[2] == {
        "job/first/step": 2,
        "job/first/loss": 0.5,
        "job/first/lr": 0.05,
        "job/first/grad_norm": 4.0,
        "job/first/skipped": 0.0,
        "job/first/tokens": 102.0,
        "job/first/label_tokens": 52.0,
        "job/first/samples": 3.0,
    }
    assert history[6] == {"job/first/step": 3, "job/first/eval_loss": 0.25}
    assert config["jobs"]["second"]["peft"]["target_modules"] == ["q_proj", "v_proj"]
    assert config["runtime"]["token_capacity"] == 64

    log_steps(Loggers(run, resumed=True), start=4, stop=4)
    history, _, resumed_id = read_wandb(tmp_path / "out")
    assert [line["job/first/step"] for line in history if "job/first/loss" in line] == [4]
    assert resumed_id == first_id

    Loggers(run).close()
    assert read_wandb(tmp_path / "out")[2] != first_id


def test_wandb_without_an_account_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def no_account(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nmore")

    monkeypatch.setattr(wandb, "init", no_account)
    with pytest.raises(
        UserError, match=r"logger\.wandb_project: .*No API key configured.*WANDB_MODE=offline"
    ) as caught:
        Loggers(run_with(tmp_path, wandb_project="demo"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["tensorboard_dir", "wandb_project"])
def test_a_tracker_that_is_not_installed_is_told_before_the_run_starts(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, package = loggers.PACKAGES[key]
    real = loggers.find_spec
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == module else real(name))
    case = make_case(tmp_path)
    case.run["logger"] = {key: str(tmp_path / "x")}
    with pytest.raises(UserError, match=rf"logger\.{key}: .*pip install {package}"):
        check_loggers(load_run(case.write()).logger)
    assert main(["validate", str(case.write())]) == 2
    assert f"logger.{key}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_imported_that_nobody_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("wandb", "tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    log_steps(Loggers(run_with(tmp_path)))
    assert not {name for name in sys.modules if name.split(".")[0] in ("wandb", "tensorboard")}


def test_a_tensorboard_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"logger\.tensorboard_dir: .*file/tb"):
        Loggers(run_with(tmp_path, tensorboard_dir=tmp_path / "file" / "tb"))


class Broken:
    """A tracker that works until it is told not to."""

    title = "Broken"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails = False

    def log(self, job: str, step: int, values: object) -> None:
        """One value."""
        self.calls.append(f"{job} {step}")
        if self.fails:
            raise BrokenPipeError(32, "Broken\npipe")

    def close(self) -> None:
        """The end."""
        self.calls.append("close")
        if self.fails:
            raise RuntimeError("no space")


def opened_with(folder: Path, *trackers: Broken) -> tuple[Loggers, list[str]]:
    """Loggers with these trackers, and what they tell."""
    notes: list[str] = []
    opened = Loggers(run_with(folder), note=notes.append)
    opened._trackers += trackers
    return opened, notes


def test_a_tracker_that_fails_is_dropped_and_told_once(tmp_path: Path) -> None:
    bad, good = Broken(), Broken()
    opened, notes = opened_with(tmp_path, bad, good)
    opened.evaluation("first", 1, 0.5)
    bad.fails = True
    log_steps(opened, start=2, stop=2)
    assert bad.calls == ["first 1", "first 2"]
    assert good.calls == ["first 1", "first 2", "second 2", "first 2", "close"]
    assert notes == ["Broken failed (BrokenPipeError: [Errno 32] Broken pipe); the run goes on without it"]


def test_a_tracker_that_cannot_be_closed_is_told_and_the_others_are_closed(tmp_path: Path) -> None:
    good, bad = Broken(), Broken()
    opened, notes = opened_with(tmp_path, good, bad)
    bad.fails = True
    opened.close()
    assert good.calls == bad.calls == ["close"]
    assert notes == ["Broken could not be closed (RuntimeError: no space): its last values may be missing"]


def test_tensorboard_on_a_full_disk_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Loggers(run_with(tmp_path, tensorboard_dir=tmp_path / "tb"))
    writer = opened._trackers[0]._writer._get_file_writer().event_writer._async_writer  # type: ignore[attr-defined]
    writer._worker.exception = OSError(28, "No space left on device")  # as its writing thread leaves it
    log_steps(opened)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("TensorBoard failed (OSError: [Errno 28] No space left")


def test_wandb_gives_a_job_that_joins_later_its_step_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    calls: list[tuple[str, object]] = []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append((name, step_metric)),
        log=lambda values: calls.append(("log", min(values))),
        finish=lambda: None,
    )
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    opened = Loggers(run_with(tmp_path, wandb_project="demo"))
    opened.evaluation("first", 1, 0.5)
    opened.evaluation("late", 1, 0.5)
    opened.evaluation("late", 2, 0.5)
    opened.close()
    assert calls == [
        ("job/first/*", "job/first/step"),
        ("log", "job/first/eval_loss"),
        ("job/late/*", "job/late/step"),
        ("log", "job/late/eval_loss"),
        ("log", "job/late/eval_loss"),
    ]
