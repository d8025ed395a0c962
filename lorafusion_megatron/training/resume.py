"""Where a run begins: at the newest whole checkpoint of its folder, or afresh."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.build import Builder
from ..config.job import RESERVED_START, JobConfig
from ..config.run import RunConfig
from ..errors import UserError
from ..mcore.parallel import Groups
from ..mcore.steps import StepCounters
from ..models.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..types import AdapterSpec, ModelSpec, Schedule
from .adapters import factor_shapes
from .state import (
    PARTS,
    check_folder,
    decode_schedule,
    drop_unfinished,
    factor_key,
    newest_state,
    read_shapes,
    set_damaged_aside,
    state_file,
)

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
RUN_OUTPUTS = ("state", "metrics.jsonl", "trace.json")
"""What a run writes into its folder, and a later one would take for its own."""
JOB_OUTPUTS = (*ADAPTER_FILES, "losses.json", "evals.json", "best")
"""What a job writes into its folder beside kept steps."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a run begins with; the same on every rank."""

    run: RunConfig
    """The run with its jobs in the order in which they came: those of the checkpoint, then new ones of the run file."""
    path: Path | None = None
    """The checkpoint; None: afresh."""
    records: Mapping[str, Mapping[str, Any]]
    """Name of each job of the checkpoint -> its record."""
    window: int = 0
    events: tuple[int, ...] | None = ()
    """Decisions about jobs whose effect the checkpoint holds, by id; None: those up to ``held_window``, since it is of
    a version that did not keep them."""
    held_window: int = -1
    """The window in or after which the checkpoint lies."""
    schedule: Schedule | None = None
    """The window to go on with, where the checkpoint lies inside it."""

    def record(self, index: int) -> Mapping[str, Any] | None:
        """What the checkpoint says of a job."""
        return self.records.get(self.run.jobs[index].name)

    def counters(self, index: int) -> StepCounters | None:
        """A job's counts, where the checkpoint holds its adapter."""
        record = self.record(index)
        return StepCounters(**record["counters"]) if record and record["counters"] else None

    def applied_by_name(self) -> dict[str, int]:
        """Name of each job of the checkpoint -> its steps done."""
        return {name: record["applied"] for name, record in self.records.items()}


def find_resume(
    run: RunConfig,
    spec: ModelSpec,
    groups: Groups,
    shape: Mapping[str, Any],
    note: Callable[[str], None],
    *,
    base: str | None = None,
    source: Path | None = None,
) -> Resumed:
    """Find where to begin; rank 0 looks, every rank gets the same.

    Args:
        run: the run file.
        spec: its base model.
        groups: this rank's groups.
        shape: what this run's schedules are made for.
        note: told what is passed over and what is taken.
        base: `weights_fingerprint` of the base model (rank 0).
        source: state folder to begin from; None: the run's own, where it resumes.

    Raises:
        UserError: a job of the checkpoint has another adapter in the run file, the base model another shape or other
            weights, or there are checkpoints but none that can be read.
    """
    found = groups.broadcast(_look(run, note, source) if groups.is_first else None)
    if isinstance(found, UserError):
        raise found
    if found is None:
        return Resumed(run=run, records={})
    path, manifest = found
    records = {record["name"]: record for record in manifest["jobs"]}
    merged = replace(run, jobs=_merge_jobs(run, records, note))
    for index, record in enumerate(records.values()):
        if record["counters"]:
            _check_factors(path, merged.adapter_spec(index), spec)
    if groups.broadcast(base is not None and manifest.get("base", base) != base):
        raise _other_base(f"{run.base_model.path} holds other weights", "must be the one that the adapters began with")
    inside, window = manifest["inside"], manifest["window"]
    fits = inside and dict(manifest["shape"]) == dict(shape)
    steps = ", ".join(f"{name} {record['applied']}/{record['num_steps']}" for name, record in records.items())
    note(f"resuming from {path}: {steps}")
    if inside and not fits:
        note("the run has another shape than the checkpoint: the rest of its window is planned anew")
    return Resumed(
        run=merged,
        path=path,
        records=records,
        window=window if fits else window + 1,
        held_window=window,
        events=None if manifest.get("events") is None else tuple(manifest["events"]),
        schedule=decode_schedule(path) if fits else None,
    )


def _look(
    run: RunConfig, note: Callable[[str], None], source: Path | None
) -> tuple[Path, dict[str, Any]] | UserError | None:
    """The checkpoint to go on from; None to begin anew."""
    folder, found = run.checkpoint.save / "state", None
    try:
        check_folder(folder)
        if source is not None or run.checkpoint.resume == "auto":
            found = newest_state(source or folder, note)
        drop_unfinished(folder, own=True)
        if found is not None and source is None:
            set_damaged_aside(folder, found[0])
    except UserError as error:
        return error
    except OSError as error:
        return UserError(
            f"{run.checkpoint.save} can't be written ({error})",
            rule="the run is written there",
            remedy="mend that, or choose another",
            key="checkpoint.save",
        )
    return found


def _merge_jobs(
    run: RunConfig, records: Mapping[str, Mapping[str, Any]], note: Callable[[str], None]
) -> tuple[JobConfig, ...]:
    """Jobs in the order of the checkpoint, whose samples carry these numbers, then the run file's new ones."""
    ours = {job.name: job for job in run.jobs}
    known = {name.lower(): name for name in records}
    for name in ours:
        before_name = known.get(name.lower(), name)
        if before_name != name:
            raise UserError(
                f"{name} where the checkpoint has {before_name}",
                rule="names of jobs differ in more than case",
                remedy="set it back, or give it another name",
                key=f"jobs.{name}.name",
            )
    jobs = []
    for name, record in records.items():
        before = _recorded_config(name, record)
        job = ours.pop(name, None)
        if job is None:
            if not record["added"]:
                note(f"{name} is not in the run file any more; it goes on as the checkpoint has it")
            job = before
        _check_same(name, before, job)
        jobs.append(job)
    return (*jobs, *ours.values())


def _recorded_config(name: str, record: Mapping[str, Any]) -> JobConfig:
    try:
        return Builder(Path()).section(JobConfig, record["config"], name)
    except UserError as error:
        raise UserError(
            f"the checkpoint has {error.given}", rule=error.rule, remedy=error.remedy, key=error.key
        ) from None


def _check_same(name: str, before: JobConfig, now: JobConfig) -> None:
    """An adapter can't change its shape, nor a job its batches, in the middle."""
    for key in (
        "peft.r",
        "peft.lora_alpha",
        "peft.use_rslora",
        "peft.target_modules",
        "peft.layers_to_transform",
        "train.global_batch_size",
    ):
        section, field = key.split(".")
        old, new = getattr(getattr(before, section), field), getattr(getattr(now, section), field)
        if field == "target_modules":  # their order says nothing
            old, new = sorted(old), sorted(new)
        if old != new:
            raise UserError(
                f"{new} where the checkpoint has {old}",
                rule="a job goes on with the adapter and the batches that it began with",
                remedy="set it back, rename the job, or set checkpoint.resume: never",
                key=f"jobs.{name}.{key}",
            )


def _check_factors(path: Path, adapter: AdapterSpec, model: ModelSpec) -> None:
    """An adapter can't go on on a base model of another shape."""
    file = state_file(path, adapter.name)
    found, expected = read_shapes(file), factor_shapes(adapter, model)
    for (layer, projection, factor), shape in expected.items():
        key = factor_key("master", layer, projection, factor)
        if found.get(key) != shape:
            has = f"is {list(found[key])}" if key in found else "is not there"
            raise _other_base(f"{projection}.{factor} of layer {layer} in {file} {has}", f"makes it {list(shape)}")
    if len(found) != len(PARTS) * len(expected):
        raise _other_base(f"{file} holds {len(found) // len(PARTS)} factors", f"has {len(expected)}")


def _other_base(given: str, rule: str) -> UserError:
    return UserError(
        given,
        rule=f"the base model {rule}",
        remedy="set it back to the model that the run began with, or set checkpoint.resume: never",
        key="base_model.path",
    )


def lies_in_run(run: RunConfig, adapter: Path | None) -> bool:
    """Whether an adapter to start from is in the folder of the run, which may write another one over it."""
    return (
        adapter is not None and Path(os.path.realpath(run.checkpoint.save)) in Path(os.path.realpath(adapter)).parents
    )


def start_afresh(run: RunConfig, note: Callable[[str], None]) -> None:
    """Rank 0, once all else that a run needs is there: make room for a run that begins anew.

    It must not be gone on with from an older one's checkpoints, nor show its results. What an older run left under the
    folder moves into ``earlier-<time>``, but for what a job starts from.

    Raises:
        UserError: it can't be moved.
    """
    try:
        _move_aside(run, note)
    except OSError as error:
        raise UserError(
            f"what an earlier run left in {run.checkpoint.save} can't be moved ({error})",
            rule="a run that begins anew moves it aside",
            remedy="move it yourself, or choose another folder",
            key="checkpoint.save",
        ) from None


def _move_aside(run: RunConfig, note: Callable[[str], None]) -> None:
    folder = run.checkpoint.save
    starts = [job.peft.init_from.resolve() for job in run.jobs if job.peft.init_from is not None]
    outputs = [folder / name for name in RUN_OUTPUTS]
    if run.checkpoint.resume == "never":  # else they are accepted requests of a run that no checkpoint holds yet
        outputs.append(folder / "events.jsonl")
    # Jobs that were added, or have left the run file since, have results there too.
    others = {
        losses.parent.name
        for losses in folder.glob("*/losses.json")
        if not losses.parent.name.startswith(RESERVED_START)
    }
    for name in dict.fromkeys([*(job.name for job in run.jobs), *sorted(others)]):
        outputs += [folder / name / output for output in JOB_OUTPUTS] + sorted((folder / name).glob("*step_*"))
    there = [path for path in outputs if path.exists() and (path.is_file() or any(path.iterdir()))]
    moving = [path for path in there if not any(_is_part(path.resolve(), start) for start in starts)]
    if not moving:
        return
    aside = folder / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
    for path in moving:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)  # a job's folder may be a link to another disk
    note(f"what an earlier run left in {folder} was moved to {aside}")


def _is_part(path: Path, adapter: Path) -> bool:
    """Whether the adapter in a folder needs ``path``."""
    return path == adapter or path in adapter.parents or (path.parent == adapter and path.name in ADAPTER_FILES)
