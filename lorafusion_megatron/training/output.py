"""The files of a run: adapters in PEFT's format, losses, a metrics line per optimizer step, the timeline."""

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..types import StepReport
from .printing import Printer

KEPT_BYTES = 10_000_000
"""Lines of metrics.jsonl that wait for a disk to have room again, about 30,000."""
RETRY_SECONDS = 5.0
"""Between two tries to write a metrics.jsonl that could not be written: it may have to be read and trimmed first."""


def strict_json(value: Any) -> str:
    """JSON in which a number that is not finite is null: JSON has no word for it, and strict readers refuse NaN."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically: a reader sees the old one or the new one, whole; see `strict_json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, strict_json(value))


def replace_text(path: Path, text: str, *, mode: int | None = None) -> None:
    """Replace a file atomically; nothing else is left where that fails.

    Args:
        path: the file.
        text: what it holds then, in UTF-8; names that are not UTF-8 come out as they were.
        mode: its permissions; None: those of a new file.
    """
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


class MetricsLog:
    """``metrics.jsonl``: one line per optimizer step of any job, written as it happens; see `strict_json`.

    A file that can't be written is told once and tried again every few seconds; until then the lines wait in memory.

    Args:
        folder: the run's folder.
        applied: name of each job of the checkpoint that a run goes on from -> its steps done; lines of later steps
            are dropped, since these are trained again. Empty for a run that begins afresh: the file begins anew.
        note: told of failures; None: they are printed.
    """

    def __init__(self, folder: Path, applied: Mapping[str, int], note: Callable[[str], None] | None = None) -> None:
        self._path, self._applied = folder / "metrics.jsonl", dict(applied)
        self._note = note or Printer().line
        self._file: io.FileIO | None = None
        self._trimmed = self._failed = False
        self._again = 0.0
        """When a file that could not be written is tried again, by `time.monotonic`."""
        self._waiting = bytearray()
        self._lost = 0
        self._write()

    def step(self, report: StepReport, *, name: str, tokens: int, label_tokens: int, samples: int) -> None:
        """Append the line of a step."""
        values = {
            "time": time.time(),
            "job": name,
            "step": report.step,
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "skipped": report.skipped,
            "samples": samples,
            "tokens": tokens,
            "label_tokens": label_tokens,
            **report.extra,
        }
        line = f"{strict_json(values)}\n".encode()
        if len(self._waiting) + len(line) <= KEPT_BYTES:
            self._waiting += line
        else:
            self._lost += 1
        self._write()

    def close(self) -> None:
        """Write what waits, if that can be, and close the file."""
        self._again = 0.0
        self._write()
        self._close_file()

    def _write(self) -> None:
        if time.monotonic() < self._again:
            return
        try:
            self._file = self._file or self._open()
            while self._waiting:  # without a buffer: what was written is known, so no line is torn or written twice
                del self._waiting[: self._file.write(self._waiting) or 0]
        except OSError as error:
            self._close_file()
            if not self._failed:
                self._note(f"metrics.jsonl could not be written ({error}); the run goes on")
            self._failed, self._again = True, time.monotonic() + RETRY_SECONDS
            return
        if self._failed:
            lost = f"; the lines of {self._lost} steps are lost" if self._lost else ""
            self._note(f"metrics.jsonl is written again{lost}")
        self._failed, self._lost = False, 0

    def _open(self) -> io.FileIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._trimmed and self._path.exists():
            text = self._path.read_text(errors="replace")
            kept = "".join(line + "\n" for line in text.splitlines() if _step_was_done(line, self._applied))
            if kept != text:
                replace_text(self._path, kept)
        self._trimmed = True
        return io.FileIO(self._path, "a")

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


def _step_was_done(line: str, applied: Mapping[str, int]) -> bool:
    try:
        value = json.loads(line)
        return bool(value["step"] <= applied.get(value["job"], -1))
    except (ValueError, KeyError, TypeError):  # a line that a kill cut off
        return False


def chrome_trace(spans: Sequence[Mapping[str, Any]], stage_names: Sequence[str]) -> dict[str, Any]:
    """The timeline as Chrome and Perfetto read it.

    Args:
        spans: ``stage`` (index into names), ``name``, ``start`` and ``stop`` in seconds, ``args``.
        stage_names: a process row each.
    """
    origin = min((span["start"] for span in spans), default=0.0)
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}} for pid, name in enumerate(stage_names)
    ]
    for span in spans:
        events.append(
            {
                "name": span["name"],
                "cat": span["kind"],
                "ph": "X",
                "pid": span["stage"],
                "tid": 0,
                "ts": round((span["start"] - origin) * 1e6, 1),
                "dur": round((span["stop"] - span["start"]) * 1e6, 1),
                "args": span["args"],
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
