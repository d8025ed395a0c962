"""The files of a run: adapters in PEFT's format, losses, a metrics line per optimizer step, the timeline."""

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
    """``metrics.jsonl``: one line per optimizer step of any job, flushed as it happens."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

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
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
