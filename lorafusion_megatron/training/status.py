"""How far a run is, from its files alone; needs no torch and works while the run goes on."""

import json
import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from ..errors import UserError
from .sequences import checkpoint_folder, sequences

SPARKS = "▁▂▃▄▅▆▇█"
PAUSE = 20
"""A step that took this many times the mean of the quicker ones was a pause: a requeue, not the run's rate."""


@dataclass(kw_only=True)
class JobStatus:
    """One job."""

    name: str
    status: str
    reason: str
    step: int
    num_steps: int
    losses: list[float] = field(default_factory=list)
    """One per step; NaN where it was not finite."""
    times: list[float] = field(default_factory=list)
    """When each step of ``losses`` was applied, seconds since 1970."""

    def eta_seconds(self) -> float | None:
        """Time left at the rate of the last 50 steps without the pauses; None where that can't be told."""
        # The mean and not the median: a job that shares its windows has steps in bursts, with waits between them.
        gaps = sorted(later - earlier for earlier, later in pairwise(self.times[-50:]) if later >= earlier)
        while len(gaps) > 1 and gaps[-1] > PAUSE * (sum(gaps[:-1]) / (len(gaps) - 1)) > 0:
            gaps.pop()
        if self.status != "running" or sum(gaps) <= 0:
            return None
        return (self.num_steps - self.step) * sum(gaps) / len(gaps)


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
        UserError: it holds no run or can't be read, or its status.json is damaged.
    """
    try:
        return _read_status(folder)
    except OSError as error:
        raise UserError(
            f"{folder} can't be read ({error.strerror or error})",
            rule="a run's folder has status.json and metrics.jsonl",
            remedy="give its checkpoint.save folder",
            key="RUN_DIR",
        ) from None


def _read_status(folder: Path) -> RunStatus:
    metrics, file = folder / "metrics.jsonl", folder / "status.json"
    state = _read_json(file) if file.is_file() else None
    if not metrics.is_file() and state is None:
        raise UserError(
            f"{folder} holds no run",
            rule="a run's folder has status.json and metrics.jsonl",
            remedy="give its checkpoint.save folder",
            key="RUN_DIR",
        )
    state = state or {}
    jobs = {entry["name"]: JobStatus(**{key: entry[key] for key in _JOB}) for entry in state.get("jobs", [])}
    for line in _lines(metrics) if metrics.is_file() else ():
        job = jobs.setdefault(
            line["job"], JobStatus(name=line["job"], status="running", reason="", step=0, num_steps=0)
        )
        job.losses.append(math.nan if line["loss"] is None else float(line["loss"]))
        job.times.append(line["time"])
        job.step = max(job.step, line["step"])
        if job.status == "running" and job.num_steps and job.step >= job.num_steps:
            job.status = "finished"
    files = [path for path in (metrics, file) if path.exists()]
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
    finite = [value for value in values if abs(value) < 1e300]  # neither NaN, nor so large that their sum is inf
    if not finite:
        return ""
    count = min(width, len(finite))
    borders = [len(finite) * i // count for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(borders)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(SPARKS[min(len(SPARKS) - 1, int((mean - low) / span * len(SPARKS)))] for mean in means)


def _newest_checkpoint(folder: Path) -> str | None:
    paths = (checkpoint_folder(folder, sequence) for sequence in sequences(folder))
    return next((str(path) for path in paths if (path / "manifest.json").is_file()), None)


def _read_json(path: Path) -> dict[str, Any]:
    """``status.json``, checked. It is replaced as a whole, so that half of one is never seen."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not _is_status(value):
        raise UserError(
            f"{path} is damaged",
            rule="it is a JSON object that the run writes",
            remedy="remove it; metrics.jsonl alone tells the steps",
            key="RUN_DIR",
        )
    return cast(dict[str, Any], value)


def _is_status(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state", ""), str):
        return False
    share, jobs = value.get("bubble_share"), value.get("jobs", [])
    return (
        (share is None or _is_finite(share))
        and _is_count(value.get("window", 0))
        and isinstance(jobs, list)
        and all(
            isinstance(job, dict) and all(key in job and fits(job[key]) for key, fits in _JOB.items()) for job in jobs
        )
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(cast(float, value)) < 1e300


def _is_loss(value: object) -> bool:
    return value is None or type(value) is float or _is_finite(value)


_JOB = {"name": _is_text, "status": _is_text, "reason": _is_text, "step": _is_count, "num_steps": _is_count}
_LINE = {"job": _is_text, "step": _is_count, "loss": _is_loss, "time": _is_finite}
"""Keys that are read of a job in status.json and of a line of metrics.jsonl -> whether a value fits."""


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; passed over is what doesn't fit, as the line that is being written right now."""
    out = []
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and all(key in value and fits(value[key]) for key, fits in _LINE.items()):
            out.append({key: value[key] for key in _LINE})
    return out
