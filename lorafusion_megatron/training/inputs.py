"""From a run file to the data sets and global batches of its jobs."""

from pathlib import Path

from lorafusion_megatron.config import RunConfig
from lorafusion_megatron.data import DataSource, GlobalBatches, JobDataset, load_dataset


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
