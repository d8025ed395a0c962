"""``validate``: check everything that a run file names, and say what the run would be."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafusion_megatron.config import RunConfig
    from lorafusion_megatron.data import JobDataset
    from lorafusion_megatron.types import ModelSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the run file")


def run(args: argparse.Namespace) -> int:
    """Check and print a summary; 0 unless something is wrong."""
    from lorafusion_megatron.config import load_run
    from lorafusion_megatron.models.checkpoint import check_base_weights
    from lorafusion_megatron.models.config import read_model_spec
    from lorafusion_megatron.training.checks import check_dataset, check_run
    from lorafusion_megatron.training.initial import check_initial_adapters
    from lorafusion_megatron.training.inputs import load_eval_dataset, load_job_dataset

    run_config = load_run(args.run_file, args.overrides)
    spec = read_model_spec(run_config.base_model.path)
    notes = check_run(run_config, spec)
    check_base_weights(run_config.base_model.path, spec)
    check_initial_adapters(run_config, spec)
    padding = run_config.runtime.padding_multiple or 1
    datasets = {}
    for index in range(len(run_config.jobs)):
        datasets[index] = load_job_dataset(run_config, index, vocab_size=spec.vocab_size)
        notes += check_dataset(run_config, spec, index, datasets[index], padding_multiple=padding)
        validation = load_eval_dataset(run_config, index, vocab_size=spec.vocab_size)
        if validation is not None:
            notes += check_dataset(run_config, spec, index, validation, padding_multiple=padding, section="eval")
    print(summary(run_config, spec, datasets, notes))
    return 0


def summary(
    run_config: "RunConfig", spec: "ModelSpec", datasets: Mapping[int, "JobDataset"], notes: Sequence[str]
) -> str:
    """The table of a checked run."""
    model = run_config.model
    sizes = [f"tensor {model.tensor_model_parallel_size}", f"pipeline {model.pipeline_model_parallel_size}"]
    if model.virtual_pipeline_model_parallel_size:
        sizes.append(f"virtual {model.virtual_pipeline_model_parallel_size}")
    head = ("job", "rank", "alpha", "rows", "tokens", "labels", "longest", "batch", "steps", "epochs", "lr")
    table = [head]
    for index, dataset in datasets.items():
        job = run_config.jobs[index]
        steps = job.train.num_steps(len(dataset))
        table.append(
            (
                job.name,
                str(job.peft.r),
                f"{job.peft.lora_alpha:g}",
                str(len(dataset)),
                str(dataset.total_tokens),
                str(int(dataset.label_tokens.sum())),
                str(int(dataset.lengths.max())),
                str(job.train.global_batch_size),
                str(steps),
                f"{steps * job.train.global_batch_size / len(dataset):.1f}",
                f"{job.optimizer.lr:g} {job.scheduler.lr_decay_style}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        f"model   {run_config.base_model.path}: {spec.family}, {spec.num_layers} layers of {spec.hidden_size}, "
        f"vocabulary {spec.vocab_size}, {run_config.base_model.dtype}",
        f"layout  {', '.join(sizes)}; {run_config.runtime.schedule}, "
        f"token capacity {run_config.runtime.token_capacity}",
        f"output  {run_config.checkpoint.save}",
        "",
        *(
            "  ".join(
                cell.rjust(width) if n else cell.ljust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ),
        *([""] if notes else []),
        *(f"note: {note}" for note in notes),
    ]
    return "\n".join(line.rstrip() for line in lines)
