"""The JSON files of a run: strict, and a disk without room ends nothing."""

import errno
import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorafusion_megatron.training import output, report
from lorafusion_megatron.training.output import MetricsLog, strict_json, write_json
from lorafusion_megatron.training.report import RunReport
from lorafusion_megatron.types import StepReport


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk that takes ``room`` bytes more of what is appended; None: all."""
    disk = SimpleNamespace(room=None)

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            if disk.room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = super().write(bytes(data[: disk.room]))
            disk.room = None if disk.room is None else disk.room - taken
            return taken

    monkeypatch.setattr(output.io, "FileIO", File)
    return disk


def log_step(metrics: MetricsLog, step: int, loss: float = 0.5, name: str = "a") -> None:
    """A step of a job."""
    done = StepReport(job=0, step=step, loss=loss, grad_norm=loss, lr=0.1, skipped=False, extra={"rate": math.inf})
    metrics.step(done, name=name, tokens=3, label_tokens=2, samples=1)


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines, strictly read."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_number_that_is_not_finite_is_null() -> None:
    value = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf}, "d": np.float64("nan"), "e": "NaN", "f": None}
    assert strict_json(value) == '{"a": [1.5, null, [null, 2]], "b": {"c": null}, "d": null, "e": "NaN", "f": null}'
    assert strict_json([0.1, 1e300]) == "[0.1, 1e+300]"


def test_losses_and_validations_are_strict_json(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "losses.json", [0.5, math.nan])
    assert (tmp_path / "deep" / "losses.json").read_text() == "[0.5, null]"


def test_metrics_are_strict_json_and_a_resume_keeps_lines_with_null(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, {})
    log_step(metrics, 1, math.nan)
    log_step(metrics, 2)
    metrics.close()
    assert [(line["loss"], line["grad_norm"], line["rate"]) for line in read(tmp_path)] == [
        (None, None, None),
        (0.5, 0.5, None),
    ]
    MetricsLog(tmp_path, {"a": 1}).close()
    assert [line["step"] for line in read(tmp_path)] == [1]


def test_lines_wait_for_a_full_disk_and_none_is_torn(tmp_path: Path, disk: SimpleNamespace) -> None:
    notes: list[str] = []
    metrics = MetricsLog(tmp_path, {}, notes.append)
    log_step(metrics, 1)
    disk.room = 20
    for step in (2, 3, 4):
        log_step(metrics, step)
    assert len(notes) == 1
    assert "No space left" in notes[0]
    disk.room = None
    log_step(metrics, 5)
    log_step(metrics, 6)
    metrics.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert notes[1:] == ["metrics.jsonl is written again"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "RETRY_SECONDS", 0.0)


def test_a_disk_that_refuses_is_not_tried_at_every_step(
    tmp_path: Path, disk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = MetricsLog(tmp_path, {}, lambda _: None)
    monkeypatch.setattr(output, "RETRY_SECONDS", 60.0)
    disk.room = 0
    log_step(metrics, 1)
    disk.room = None
    log_step(metrics, 2)
    assert read(tmp_path) == []
    metrics.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2], "the end tries once more"


def test_a_log_that_needs_no_trimming_is_left_as_it_is_and_a_failed_trim_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"job": "a", "step": 1}\n')
    inode = path.stat().st_ino
    MetricsLog(tmp_path, {"a": 1}).close()
    assert path.stat().st_ino == inode

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output.os, "fsync", full)
    said: list[str] = []
    MetricsLog(tmp_path, {}, said.append).close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert "No space left on device" in said[0]


def test_what_no_longer_waits_is_counted(
    tmp_path: Path, disk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "KEPT_BYTES", 400)
    notes: list[str] = []
    metrics = MetricsLog(tmp_path, {}, notes.append)
    disk.room = 0
    for step in range(1, 6):
        log_step(metrics, step)
    disk.room = None
    log_step(metrics, 6)
    log_step(metrics, 7)
    kept = [line["step"] for line in read(tmp_path)]
    lost = 7 - len(kept)
    assert 0 < lost < 6
    assert notes[1] == f"metrics.jsonl is written again; the lines of {lost} steps are lost"


def test_a_folder_that_cannot_be_written_at_first_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "out"
    blocked.write_text("in the way")
    metrics = MetricsLog(blocked, {"a": 1})
    log_step(metrics, 2)
    blocked.unlink()
    blocked.mkdir()
    (blocked / "metrics.jsonl").write_text('{"job": "a", "step": 1}\n{"job": "a", "step": 2}\n{"jo')
    log_step(metrics, 3)
    assert [line["step"] for line in read(blocked)] == [1, 2, 3]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert "could not be written" in told[0]
    assert "written again" in told[1]


def test_a_status_that_cannot_be_written_is_told_once_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    groups: Any = SimpleNamespace(is_first=True)
    monkeypatch.setattr(report, "flops_per_token", lambda spec: 1.0)
    monkeypatch.setattr(report, "matmul_rate", lambda device: 1.0)
    groups.device = None
    told: Any = SimpleNamespace(note=notes.append)
    spec: Any = None
    run = RunReport(tmp_path / "out", groups, told, {}, [1], spec)

    def write() -> None:
        run.status("running", window=1, last_checkpoint=None)

    (tmp_path / "out").touch()
    write()
    write()
    assert len(notes) == 1
    (tmp_path / "out").unlink()
    write()
    assert json.loads((tmp_path / "out" / "status.json").read_text())["window"] == 1
    (tmp_path / "out" / "status.json").unlink()
    (tmp_path / "out" / "status.json").mkdir()
    write()
    assert len(notes) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["status.json"]
