"""From a run file to the data sets and global batches of its jobs, everything checked; no torch."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorafusion_megatron.config import RunConfig
from lorafusion_megatron.data import DataSource, GlobalBatches, JobDataset
from lorafusion_megatron.models.checkpoint import check_base_weights
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.training.checks import check_dataset, check_run
from lorafusion_megatron.training.hosts import world_size
from lorafusion_megatron.training.initial import check_initial_adapters
from lorafusion_megatron.training.planning import cost_model
from lorafusion_megatron.training.row_cache import NAME, RowCache
from lorafusion_megatron.types import ModelSpec

type Part = Literal["dataset", "eval"]
PARTS: tuple[Part, Part] = ("dataset", "eval")
"""The sections of a job that name data."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads, checked."""

    spec: ModelSpec
    """The base model."""
    datasets: dict[int, JobDataset]
    """Job index -> training rows."""
    eval_datasets: dict[int, JobDataset]
    """Job index -> validation rows, for the jobs that have some."""
    notes: tuple[str, ...]
    """What is allowed but should be told."""


def row_cache(run: RunConfig, *, write: bool, say: Callable[[str], None] | None = None) -> RowCache:
    """Where a run's tokenized rows are kept; ``write``: whether they are put there too (by a rank of the run)."""
    folder = run.checkpoint.save / NAME
    if not write:
        return RowCache(folder, write=False)
    return RowCache(folder, rank=int(os.environ.get("RANK", "0")), ranks=world_size(), say=say)


def load_inputs(run: RunConfig, rows: RowCache, *, padding_multiple: int = 1) -> Inputs:
    """Read everything that a run names and check all of it; makes no process group and writes nothing but the cache.

    Args:
        run: the run file.
        rows: where tokenized rows are kept.
        padding_multiple: rows that each job's part of a microbatch will be padded to.

    Raises:
        UserError: the first thing that is wrong; cheap checks come first.
    """
    spec = read_model_spec(run.base_model.path)
    notes = check_run(run, spec)
    cost_model(run, spec)
    check_base_weights(run.base_model.path, spec)
    check_initial_adapters(run, spec)
    sources = [_source(run, index, part, spec.vocab_size) for index in range(len(run.jobs)) for part in PARTS]
    rows.share_out([source for source in sources if source is not None])
    datasets: dict[int, JobDataset] = {}
    eval_datasets: dict[int, JobDataset] = {}
    for index in range(len(run.jobs)):
        for part, found in zip(PARTS, (datasets, eval_datasets), strict=True):
            dataset = load_rows(run, index, part, rows, vocab_size=spec.vocab_size)
            if dataset is not None:
                found[index] = dataset
                notes += check_dataset(run, spec, index, dataset, padding_multiple=padding_multiple, section=part)
    if (trouble := rows.take_trouble()) is not None:
        notes += (trouble,)
    return Inputs(spec=spec, datasets=datasets, eval_datasets=eval_datasets, notes=tuple(notes))


def load_rows(
    run: RunConfig, job_index: int, part: Part, rows: RowCache, *, vocab_size: int, key: str | None = None
) -> JobDataset | None:
    """The training or validation rows of a job; None where it has none for validation.

    Args:
        run: the run file.
        job_index: index into ``run.jobs``.
        part: "dataset" or "eval", whose ``path`` names them.
        rows: where they are kept.
        vocab_size: of the base model: ids must lie below it.
        key: the job's place, for messages; None: that in ``run.jobs``.

    Raises:
        UserError: whatever is wrong with the file, a row or the tokenizer.
    """
    source = _source(run, job_index, part, vocab_size, key)
    return None if source is None else rows.load(source)


def job_batches(run: RunConfig, job_index: int, dataset: JobDataset) -> GlobalBatches:
    """The global batches of a job over its rows."""
    job = run.jobs[job_index]
    return GlobalBatches(
        dataset,
        job=job_index,
        seed=run.job_seed(job_index),
        shuffle=job.dataset.shuffle,
        global_batch_size=job.train.global_batch_size,
        train_iters=job.train.num_steps(len(dataset)),
    )


def _source(run: RunConfig, job_index: int, part: Part, vocab_size: int, key: str | None = None) -> DataSource | None:
    job, key = run.jobs[job_index], key or f"jobs[{job_index}]"
    path = job.dataset.path if part == "dataset" else job.eval.path
    if path is None:
        return None
    return DataSource(
        path=path,
        key=f"{key}.{part}.path",
        model=run.base_model.path,
        vocab_size=vocab_size,
        max_length=job.max_length,
        max_length_key=f"{key}.max_length",
        truncate=job.dataset.truncate,
        chat_template=job.dataset.chat_template,
        chat_template_key=f"{key}.dataset.chat_template",
        trust_remote_code=run.base_model.trust_remote_code,
    )
