"""Checks of a run against its base model, its data and the machine; they need no torch and write nothing."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from lorafusion_megatron.config import JobConfig, RunConfig
from lorafusion_megatron.data import JobDataset
from lorafusion_megatron.data.reader import place_of
from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.families import check_tensor_parallel
from lorafusion_megatron.models.projections import resolve_targets
from lorafusion_megatron.training.hosts import world_size
from lorafusion_megatron.training.loggers import check_loggers
from lorafusion_megatron.types import ModelSpec, padded


def check_run(run: RunConfig, spec: ModelSpec) -> list[str]:
    """Check a run against the dimensions of its base model, and where it writes.

    Args:
        run: the run file.
        spec: the base model.

    Returns:
        Notes: what is allowed but has no effect, or may surprise.

    Raises:
        UserError: the model can't be laid out so, a job asks for what the model can't do, ``WORLD_SIZE`` is set and
            doesn't fit, the output folder can't be written, or a tracker that it logs to is not installed.
    """
    check_tensor_parallel(spec, run.model.tensor_model_parallel_size)
    _check_stages(run, spec)
    if os.environ.get("WORLD_SIZE"):
        run.topology(world_size())
    for index, job in enumerate(run.jobs):
        _check_job(job, f"jobs[{index}]", spec)
    _check_output(run.checkpoint.save)
    for index, job in enumerate(run.jobs):
        folder, key = run.checkpoint.save / job.name, f"jobs[{index}].name"
        if os.path.lexists(folder):
            _check_writable(folder, "the job's adapter is written there", "move it away, or rename the job", key)
    check_apart(run.checkpoint.save, [job.name for job in run.jobs])
    check_loggers(run.logger)
    notes = []
    if run.model.sequence_parallel and run.model.tensor_model_parallel_size == 1:
        notes.append("model.sequence_parallel has no effect with tensor_model_parallel_size 1")
    return notes


def check_dataset(
    run: RunConfig,
    spec: ModelSpec,
    job_index: int,
    dataset: JobDataset,
    *,
    padding_multiple: int = 1,
    section: str = "dataset",
    key: str | None = None,
) -> list[str]:
    """Check the rows of a job against its run and its base model.

    Args:
        run: the run file.
        spec: the base model.
        job_index: index into ``run.jobs``.
        dataset: the job's rows.
        padding_multiple: rows that the LoRA backend pads to.
        section: ``dataset``, or ``eval`` for the validation rows.
        key: the job's place, for messages; None: that in ``run.jobs``.

    Returns:
        Notes: rows that train nothing, were cut, come more than once in a batch, or hold what nothing reads; a job
            whose one step has the rate 0.

    Raises:
        UserError: a row is longer than a microbatch or than the model reaches, the job has too many
            steps, or the warmup is longer than the job.
    """
    job, job_key = run.jobs[job_index], key or f"jobs[{job_index}]"
    key = f"{job_key}.{section}.path"
    longest = int(dataset.lengths.max())
    capacity = run.runtime.token_capacity
    limits = [(spec.max_position_embeddings, "the model's max_position_embeddings is")]
    if spec.sliding_window is not None:
        limits.append((spec.sliding_window, "attention over sliding windows is not supported beyond the window's"))
    for limit, rule in limits:
        if longest > limit:
            raise _too_long(dataset, limit, f"{rule} {limit}", "shorten the row or set max_length and truncate", key)
    multiple = padding_multiple
    if padded(longest, multiple) > capacity:
        rule = f"a microbatch holds token_capacity = {capacity} tokens (rows are padded to a multiple of {multiple})"
        raise _too_long(
            dataset, capacity // multiple * multiple, rule, "raise runtime.token_capacity or shorten the row", key
        )
    notes = _row_notes(job.name, dataset)
    if section == "dataset":
        job.check_length(len(dataset), key=job_key)
        notes += _training_notes(job, len(dataset))
    return notes


def _row_notes(name: str, dataset: JobDataset) -> list[str]:
    """What is told of a job's rows for training or validation."""
    notes = []
    if dataset.rows_without_labels:
        notes.append(
            f"{name}: {dataset.rows_without_labels} of {len(dataset)} rows of {dataset.path} have no label token "
            "and train nothing"
        )
    if dataset.rows_truncated:
        notes.append(f"{name}: {dataset.rows_truncated} rows of {dataset.path} were cut to max_length")
    if dataset.unread:
        notes.append(
            f"{name}: rows of {dataset.path} have {', '.join(dataset.unread)}, which the chat template never "
            "mentions: nothing is trained of it"
        )
    return notes


def _training_notes(job: JobConfig, rows: int) -> list[str]:
    """What is told of a job's steps over so many rows."""
    notes = []
    if job.train.global_batch_size > rows:
        notes.append(
            f"{job.name}: a global batch of {job.train.global_batch_size} takes some of the {rows} rows more than once"
        )
    if job.optimizer.lr > 0 and job.train.num_steps(rows) == 1 and job.lr_at(1, 1) == 0:
        notes.append(
            f"{job.name}: its one step trains nothing: {job.scheduler.lr_decay_style} decay ends at min_lr 0; "
            "set scheduler.min_lr, or lr_decay_style: constant"
        )
    return notes


def check_apart(save: Path, names: Sequence[str]) -> None:
    """Jobs whose folders are links must not write into one.

    Args:
        save: the run's folder.
        names: of its jobs.

    Raises:
        UserError: two of them lead to one folder.
    """
    places: dict[str, str] = {}
    for name in names:
        place = os.path.realpath(save / name)
        if place in places:
            raise UserError(
                f"{save / name} and {save / places[place]} are {place}",
                rule="each job has a folder of its own",
                remedy="remove the link, or rename the job",
                key=f"jobs.{name}.name",
            )
        places[place] = name


def _check_stages(run: RunConfig, spec: ModelSpec) -> None:
    layout, chunks = run.model.pipeline_layout, run.model.chunks
    if layout == "auto" and chunks > spec.num_layers:
        raise UserError(
            f"{chunks} pipeline stages (chunks included) for {spec.num_layers} layers",
            rule="every stage needs a layer",
            remedy=f"use at most {spec.num_layers}",
            key="model.pipeline_model_parallel_size",
        )
    if layout != "auto" and sum(layout) != spec.num_layers:
        raise UserError(
            f"{sum(layout)} layers over all stages",
            rule=f"the model has {spec.num_layers}",
            remedy="give numbers that add up to that, or auto",
            key="model.pipeline_layout",
        )


def _check_job(job: JobConfig, key: str, spec: ModelSpec) -> None:
    resolve_targets(spec, job.peft.target_modules, key=f"{key}.peft.target_modules")
    for index, layer in enumerate(job.peft.layers_to_transform or ()):
        if layer >= spec.num_layers:
            raise UserError(
                f"layer {layer}",
                rule=f"the model has the layers 0 to {spec.num_layers - 1}",
                remedy="remove it",
                key=f"{key}.peft.layers_to_transform[{index}]",
            )
    if job.max_length is None:
        return
    for limit, name in (
        (spec.max_position_embeddings, "max_position_embeddings"),
        (spec.sliding_window, "sliding_window"),
    ):
        if limit is not None and job.max_length > limit:
            raise UserError(
                f"got {job.max_length}",
                rule=f"the model's {name} is {limit}, and longer samples are not supported",
                remedy=f"use at most {limit}",
                key=f"{key}.max_length",
            )


def _check_output(folder: Path) -> None:
    """Check that ``folder`` is, or can become, a folder that this user may write."""
    there = folder.absolute()
    try:
        os.stat(there)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(
                f"{there} can't be a folder ({os.strerror(error.errno)})",
                rule="the run is written there",
                remedy="choose another",
                key="checkpoint.save",
            ) from None
    while not os.path.lexists(there):
        there = there.parent
    _check_writable(there, "the run is written there", "choose another", "checkpoint.save")


def _check_writable(path: Path, rule: str, remedy: str, key: str) -> None:
    """Check that what is there is a folder that this user may write."""
    is_folder = os.path.isdir(path)
    if not (is_folder and os.access(path, os.W_OK | os.X_OK)):
        reason = "may not be written" if is_folder else "is no folder, or one that may not be entered"
        raise UserError(f"{path} {reason}", rule=rule, remedy=remedy, key=key)


def _too_long(dataset: JobDataset, limit: int, rule: str, remedy: str, key: str) -> UserError:
    """The error about the first row of more than ``limit`` tokens."""
    row = int((dataset.lengths > limit).argmax())
    place = place_of(dataset.path, row, key=key)
    return UserError(f"{place} has {dataset.lengths[row]} tokens", rule=rule, remedy=remedy, key=key)
