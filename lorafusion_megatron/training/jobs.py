"""The jobs of a run: what each is, where it stands, and the table of them that a checkpoint keeps."""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config.job import JobConfig
from ..data.dataset import JobDataset
from ..data.order import GlobalBatches

Status = Literal["running", "paused", "finished", "stopped", "cancelled"]
LIVE: tuple[Status, ...] = ("running", "paused")


@dataclass(kw_only=True)
class Job:
    """One job on this rank; everything but the data is the same on every rank."""

    index: int
    """Number in the run, which its samples carry; never given to another job."""
    config: JobConfig
    dataset: JobDataset | None
    """None for a job that needs no data any more."""
    source: GlobalBatches | None
    eval_dataset: JobDataset | None = None
    status: Status = "running"
    reason: str = ""
    """Why it is not running, in a few words."""
    slot: int | None = None
    """Slot of its adapter while it has one; a slot serves the next job when this one has left it."""
    num_steps: int = 0
    applied: int = 0
    """Optimizer steps done."""
    losses: list[float] = field(default_factory=list)
    evals: list[tuple[int, float]] = field(default_factory=list)
    """(step, validation loss)."""
    added: bool = False
    """Whether it came while the run went on, and is not in the run file."""

    @property
    def name(self) -> str:
        """The job's name."""
        return self.config.name

    @property
    def live(self) -> bool:
        """Whether it still has steps to train."""
        return self.status in LIVE

    def let_go(self) -> None:
        """Give its data back."""
        self.dataset = self.source = self.eval_dataset = None

    def eval_due(self) -> bool:
        """Whether its adapter, as it is now, is to be validated and was not yet.

        That of a job that has done all its steps is, also where a stop came between its last step and that.
        """
        every = self.config.eval.interval
        if self.config.eval.path is None or every is None or self.applied == 0:
            return False
        if not (self.live or (self.status == "finished" and not self.reason)):
            return False
        return (self.applied % every == 0 or self.applied >= self.num_steps) and (
            not self.evals or self.evals[-1][0] < self.applied
        )

    def best_eval(self) -> tuple[int, float] | None:
        """(step, loss) of its best validation; one whose loss is not finite is worse than any other."""
        return min(self.evals, key=lambda e: e[1] if math.isfinite(e[1]) else math.inf, default=None)

    def out_of_patience(self) -> bool:
        """Whether as many validations as its patience passed without a better loss."""
        best, patience = self.best_eval(), self.config.eval.patience
        if best is None or patience is None:
            return False
        return len([e for e in self.evals if e[0] > best[0]]) >= patience

    def record(
        self, applied: int | None = None, *, status: str = "", reason: str = "", evals: int | None = None
    ) -> dict[str, Any]:
        """What a checkpoint says of it: now, or as it was after ``applied`` steps and ``evals`` validations."""
        steps = self.applied if applied is None else applied
        status, reason = (status, reason) if status else (self.status, self.reason)
        if status in LIVE and steps >= self.num_steps:
            status = "finished"
        return {
            "index": self.index,
            "name": self.name,
            "status": status,
            "reason": reason,
            "num_steps": self.num_steps,
            "applied": steps,
            "losses": self.losses[:steps],
            "evals": [list(e) for e in self.evals[:evals] if e[0] <= steps],
            "added": self.added,
            "config": plain(self.config),
        }


def plain(value: Any) -> Any:
    """A config dataclass as JSON data, which `config.Builder` reads back in any folder; unset keys are left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: plain(item) for name, item in pairs if item is not None}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return os.path.abspath(value) if isinstance(value, Path) else value
