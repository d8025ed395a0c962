"""Experiment trackers: TensorBoard and Weights & Biases, each imported only where a run asks for it.

A tracker that fails while the run goes on is dropped and told once: the run goes on without it.

Both get the tags ``job/<name>/loss``, ``lr``, ``grad_norm``, ``tokens``, ``label_tokens``, ``samples``, ``skipped``
and, where the job is validated, ``eval_loss``, over the job's own optimizer steps.
"""

import dataclasses
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..config.run import LoggerConfig, RunConfig
from ..errors import UserError
from ..types import StepReport
from .printing import Printer

PACKAGES = {"tensorboard_dir": ("tensorboard", "tensorboard"), "wandb_project": ("wandb", "wandb")}
"""Key of the logger section -> (module, package that brings it)."""


class Tracker(Protocol):
    """Where values of jobs go; may raise anything."""

    title: str
    """As users know it."""

    def log(self, job: str, step: int, values: Mapping[str, float]) -> None:
        """Values of a job at one of its optimizer steps."""

    def close(self) -> None:
        """Everything is written."""


def check_loggers(logger: LoggerConfig) -> None:
    """Check that the trackers that a run asks for are installed, without importing them.

    Raises:
        UserError: one isn't.
    """
    for key, (module, package) in PACKAGES.items():
        if getattr(logger, key) is not None and find_spec(module) is None:
            raise UserError(
                f"{key} is set",
                rule=f"it needs the package {package}, which is not installed",
                remedy=f"pip install {package}, or set the key to null",
                key=f"logger.{key}",
            )


class Loggers:
    """All trackers of a run, on the rank that writes files.

    Args:
        run: the checked run.
        resumed: whether the run goes on from a checkpoint; then W&B's run goes on too.
        note: told of a tracker that fails; None: it is printed.

    Raises:
        UserError: a tracker is not installed, or TensorBoard's folder can't be made.
    """

    def __init__(self, run: RunConfig, *, resumed: bool = False, note: Callable[[str], None] | None = None) -> None:
        check_loggers(run.logger)
        self._note = note or Printer().line
        self._trackers: list[Tracker] = []
        if run.logger.tensorboard_dir is not None:
            self._trackers.append(_TensorBoard(run.logger.tensorboard_dir))
        if run.logger.wandb_project is not None:
            self._trackers.append(_Wandb(run, run.logger.wandb_project, resumed=resumed))

    def step(self, report: StepReport, *, name: str, tokens: int, label_tokens: int, samples: int) -> None:
        """An optimizer step of a job.

        Args:
            report: what the step did.
            name: the job's name.
            tokens, label_tokens: of the global batch, without padding.
            samples: of the global batch that have a label token.
        """
        values = {
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "skipped": float(report.skipped),
            "tokens": float(tokens),
            "label_tokens": float(label_tokens),
            "samples": float(samples),
        }
        self._log(name, report.step, {**values, **report.extra})

    def evaluation(self, name: str, step: int, loss: float) -> None:
        """A validation of a job after its optimizer step ``step``."""
        self._log(name, step, {"eval_loss": loss})

    def close(self) -> None:
        """Write out everything; safe to call twice."""
        while self._trackers:
            tracker = self._trackers.pop()
            try:
                tracker.close()
            except Exception as error:
                self._note(f"{tracker.title} could not be closed ({_one_line(error)}): its last values may be missing")

    def _log(self, job: str, step: int, values: Mapping[str, float]) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(job, step, values)
            except Exception as error:
                # Not closed: what is broken may raise once more, or wait for a server that has gone.
                self._trackers.remove(tracker)
                self._note(f"{tracker.title} failed ({_one_line(error)}); the run goes on without it")


class _TensorBoard:
    """TensorBoard events in one folder."""

    title = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            # Flushed every 10 s (TensorBoard's default is 120): a killed run loses little.
            self._writer = SummaryWriter(str(folder), flush_secs=10)
        except OSError as error:
            raise UserError(
                f"{folder} can't be written ({error.strerror})",
                rule="TensorBoard's events are written there",
                remedy="choose another folder",
                key="logger.tensorboard_dir",
            ) from None

    def log(self, job: str, step: int, values: Mapping[str, float]) -> None:
        """Values of a job at one of its optimizer steps."""
        for name, value in values.items():
            self._writer.add_scalar(f"job/{job}/{name}", value, step)

    def close(self) -> None:
        """Everything is written."""
        self._writer.close()


class _Wandb:
    """A W&B run whose jobs each have a step axis of their own, ``job/<name>/step``.

    Note: W&B's own variables rule how it works: ``WANDB_MODE=offline`` writes to the run's folder alone, for
        ``wandb sync`` later. The run's id is kept in ``wandb_run_id``, so that a resumed run goes on in W&B too.
    """

    title = "W&B"

    def __init__(self, run: RunConfig, project: str, *, resumed: bool) -> None:
        import wandb

        folder = run.checkpoint.save
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_run_id"
        if not (resumed and id_file.is_file()):
            id_file.write_text(uuid.uuid4().hex[:16])
        try:
            self._run = wandb.init(
                project=project,
                dir=str(folder),
                id=id_file.read_text().strip(),
                name=folder.name,
                resume="allow" if resumed else None,
                config=_plain(run) | {"jobs": {job.name: _plain(job) for job in run.jobs}},
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"W&B can't start ({str(error).splitlines()[0]})",
                rule="it needs an account, or WANDB_MODE=offline in the environment",
                remedy="log in, set that, or set the key to null",
                key="logger.wandb_project",
            ) from None
        self._defined: set[str] = set()
        """Jobs whose step axis W&B knows; jobs join while a run goes on."""

    def log(self, job: str, step: int, values: Mapping[str, float]) -> None:
        """Values of a job at one of its optimizer steps."""
        if job not in self._defined:
            self._run.define_metric(f"job/{job}/*", step_metric=f"job/{job}/step")
            self._defined.add(job)
        self._run.log({f"job/{job}/step": step, **{f"job/{job}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        """Everything is written."""
        self._run.finish()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _plain(value: Any) -> Any:
    """Config dataclasses as plain data."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
