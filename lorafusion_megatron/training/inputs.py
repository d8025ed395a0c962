"""From a run file to the data sets and global batches of its jobs, everything checked; no torch."""

from dataclasses import dataclass
from pathlib import Path

from lorafusion_megatron.config import RunConfig
from lorafusion_megatron.data import DataSource, GlobalBatches, JobDataset, load_dataset
from lorafusion_megatron.models.checkpoint import check_base_weights
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.training.checks import check_dataset, check_run
from lorafusion_megatron.training.initial import check_initial_adapters
from lorafusion_megatron.types import ModelSpec


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


def load_inputs(run: RunConfig, *, padding_multiple: int = 1) -> Inputs:
    """Read everything that a run names and check all of it; makes no process group and writes nothing.

    Args:
        run: the run file.
        padding_multiple: rows that each job's part of a microbatch will be padded to.

    Raises:
        UserError: the first thing that is wrong; cheap checks come first.
    """
    spec = read_model_spec(run.base_model.path)
    notes = check_run(run, spec)
    check_base_weights(run.base_model.path, spec)
    check_initial_adapters(run, spec)
    datasets: dict[int, JobDataset] = {}
    eval_datasets: dict[int, JobDataset] = {}
    for index in range(len(run.jobs)):
        datasets[index] = load_job_dataset(run, index, vocab_size=spec.vocab_size)
        notes += check_dataset(run, spec, index, datasets[index], padding_multiple=padding_multiple)
        rows = load_eval_dataset(run, index, vocab_size=spec.vocab_size)
        if rows is not None:
            eval_datasets[index] = rows
            notes += check_dataset(run, spec, index, rows, padding_multiple=padding_multiple, section="eval")
    return Inputs(spec=spec, datasets=datasets, eval_datasets=eval_datasets, notes=tuple(notes))


def load_job_dataset(run: RunConfig, job_index: int, *, vocab_size: int) -> JobDataset:
    """The training rows of a job.

    Args:
        run: the run file.
        job_index: index into ``run.jobs``.
        vocab_size: of the base model: ids must lie below it.

    Raises:
        UserError: whatever is wrong with the file, a row or the tokenizer.
    """
    return _load(run, job_index, run.jobs[job_index].dataset.path, "dataset", vocab_size)


def load_eval_dataset(run: RunConfig, job_index: int, *, vocab_size: int) -> JobDataset | None:
    """The validation rows of a job, read as the training rows are; None where it has none.

    Raises:
        UserError: as `load_job_dataset`.
    """
    path = run.jobs[job_index].eval.path
    return None if path is None else _load(run, job_index, path, "eval", vocab_size)


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


def _load(run: RunConfig, job_index: int, path: Path, section: str, vocab_size: int) -> JobDataset:
    job, key = run.jobs[job_index], f"jobs[{job_index}]"
    return load_dataset(
        DataSource(
            path=path,
            key=f"{key}.{section}.path",
            model=run.base_model.path,
            vocab_size=vocab_size,
            max_length=job.max_length,
            max_length_key=f"{key}.max_length",
            truncate=job.dataset.truncate,
            chat_template=job.dataset.chat_template,
            chat_template_key=f"{key}.dataset.chat_template",
            trust_remote_code=run.base_model.trust_remote_code,
        )
    )
