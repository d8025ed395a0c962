"""How far a run is, from its files alone; needs no torch and works while the run goes on."""

import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import UserError

SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(kw_only=True)
class JobStatus:
    """One job."""

    name: str
    status: str
    reason: str
    step: int
    num_steps: int
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each step of ``losses`` was applied, seconds since 1970."""

    def eta_seconds(self) -> float | None:
        """Time left at the rate of the last 50 steps; None where that can't be told."""
        recent = self.times[-50:]
        if self.status != "running" or len(recent) < 2 or recent[-1] <= recent[0]:
            return None
        return (self.num_steps - self.step) * (recent[-1] - recent[0]) / (len(recent) - 1)


@dataclass(kw_only=True)
class RunStatus:
    """A whole run."""

    state: str
    """running | stopped | done | unknown"""
    window: int
    bubble_share: float | None
    last_checkpoint: str | None
    updated: float
    """When one of its files was last written, seconds since 1970."""
    jobs: list[JobStatus]


def read_status(folder: Path) -> RunStatus:
    """Read a run's folder.

    Raises:
        UserError: it holds no run.
    """
    metrics, state = folder / "metrics.jsonl", _read_json(folder / "status.json")
    if not metrics.is_file() and state is None:
        raise UserError(
            f"{folder} holds no run",
            rule="a run's folder has status.json and metrics.jsonl",
            remedy="give its checkpoint.save folder",
            key="RUN_DIR",
        )
    state = state or {}
    jobs = {
        entry["name"]: JobStatus(
            name=entry["name"],
            status=entry["status"],
            reason=entry["reason"],
            step=entry["step"],
            num_steps=entry["num_steps"],
        )
        for entry in state.get("jobs", [])
    }
    for line in _lines(metrics):
        job = jobs.setdefault(
            line["job"], JobStatus(name=line["job"], status="running", reason="", step=0, num_steps=0)
        )
        job.losses.append(line["loss"])
        job.times.append(line["time"])
        job.step = max(job.step, line["step"])
        if job.status == "running" and job.num_steps and job.step >= job.num_steps:
            job.status = "finished"
    files = [path for path in (metrics, folder / "status.json") if path.exists()]
    return RunStatus(
        state=state.get("state", "unknown"),
        window=state.get("window", 0),
        bubble_share=state.get("bubble_share"),
        last_checkpoint=_newest_checkpoint(folder / "state"),
        updated=max((path.stat().st_mtime for path in files), default=time.time()),
        jobs=list(jobs.values()),
    )


def sparkline(values: list[float], width: int = 24) -> str:
    """A curve of ``width`` characters; each shows the mean of its share of the finite values."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    count = min(width, len(finite))
    borders = [len(finite) * i // count for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(borders)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(SPARKS[min(len(SPARKS) - 1, int((mean - low) / span * len(SPARKS)))] for mean in means)


def _newest_checkpoint(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    names = sorted(path.name for path in folder.iterdir() if path.name.isdigit() and (path / "manifest.json").is_file())
    return str(folder / names[-1]) if names else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    out = []
    try:
        text = path.read_text()
    except OSError:
        return out
    for line in text.splitlines():
        try:
            value = json.loads(line)
            out.append({key: value[key] for key in ("job", "step", "loss", "time")})
        except (ValueError, KeyError, TypeError):  # the line that is being written right now
            continue
    return out
