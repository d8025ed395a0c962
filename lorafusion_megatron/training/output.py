"""The files of a run: adapters in PEFT's format, losses, a metrics line per optimizer step, the timeline."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..types import StepReport


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically: a reader sees the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class MetricsLog:
    """``metrics.jsonl``: one line per optimizer step of any job, flushed as it happens.

    Args:
        folder: the run's folder.
        applied: name of each job of the checkpoint that a run goes on from -> its steps done; lines of later steps
            are dropped, since these are trained again. Empty for a run that begins afresh: the file begins anew.
    """

    def __init__(self, folder: Path, applied: Mapping[str, int]) -> None:
        path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_was_done(line, applied)]
            temporary = path.with_name(".metrics.jsonl")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(path)
        self._file = path.open("a")
        self._failed = False

    def step(self, report: StepReport, *, name: str, tokens: int, label_tokens: int, samples: int) -> None:
        """Append the line of a step."""
        line = {
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
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            # A full disk must not end the run; said once, the adapters' own messages follow.
            if not self._failed:
                print(f"metrics.jsonl could not be written ({error}); the run goes on", flush=True)
            self._failed = True

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()


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
