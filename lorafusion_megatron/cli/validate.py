"""``validate``: check everything that a run file names, and say what the run would be."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafusion_megatron.config import RunConfig
    from lorafusion_megatron.training.inputs import Inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the run file")


def run(args: argparse.Namespace) -> int:
    """Check and print a summary; 0 unless something is wrong."""
    from lorafusion_megatron.config import load_run
    from lorafusion_megatron.training.inputs import load_inputs, row_cache
    from lorafusion_megatron.training.planning import expected_tile, padding_multiple

    run_config = load_run(args.run_file, args.overrides)
    runtime = run_config.runtime
    sure = runtime.device == "cuda" or runtime.lora_backend == "triton"
    padding = padding_multiple(runtime, expected_tile(runtime) if sure else 1)
    inputs = load_inputs(run_config, row_cache(run_config, write=False), padding_multiple=padding)
    print(summary(run_config, inputs, _too_long_on_gpu(run_config, inputs)))
    return 0


def _too_long_on_gpu(run_config: "RunConfig", inputs: "Inputs") -> list[str]:
    """Notes on jobs whose longest row fits into a microbatch as it is, but not padded to a GPU's tiles."""
    from lorafusion_megatron.training.planning import expected_tile, padding_multiple
    from lorafusion_megatron.types import padded

    runtime = run_config.runtime
    multiple = padding_multiple(runtime, expected_tile(runtime))
    notes = []
    for datasets in (inputs.datasets, inputs.eval_datasets):
        for index, rows in datasets.items():
            longest = int(rows.lengths.max())
            if padded(longest, multiple) > runtime.token_capacity:
                notes.append(
                    f"{run_config.jobs[index].name}: a GPU pads rows to {multiple}, and a row of {longest} tokens does "
                    f"not fit into token_capacity = {runtime.token_capacity} then: train refuses it there"
                )
    return notes


HEAD = ("job", "rank", "alpha", "rows", "tokens", "labels", "longest", "batch", "steps", "epochs", "lr")


def summary(run_config: "RunConfig", inputs: "Inputs", notes: Sequence[str] = ()) -> str:
    """What a checked run would be: model, layout, a table of the jobs, notes."""
    spec, model = inputs.spec, run_config.model
    sizes = [f"tensor {model.tensor_model_parallel_size}", f"pipeline {model.pipeline_model_parallel_size}"]
    if model.virtual_pipeline_model_parallel_size:
        sizes.append(f"virtual {model.virtual_pipeline_model_parallel_size}")
    lines = [
        f"model   {run_config.base_model.path}: {spec.family}, {spec.num_layers} layers of {spec.hidden_size}, "
        f"vocabulary {spec.vocab_size}, {run_config.base_model.dtype}",
        f"layout  {', '.join(sizes)}; {run_config.runtime.schedule}, "
        f"token capacity {run_config.runtime.token_capacity}",
        f"output  {run_config.checkpoint.save}",
        "",
        *_aligned([HEAD, *(_job_row(run_config, inputs, index) for index in inputs.datasets)]),
    ]
    if notes := (*inputs.notes, *notes):
        lines += ["", *(f"note: {note}" for note in notes)]
    return "\n".join(lines)


def _job_row(run_config: "RunConfig", inputs: "Inputs", index: int) -> tuple[str, ...]:
    """The cells of `HEAD` for one job."""
    job, dataset = run_config.jobs[index], inputs.datasets[index]
    steps = job.train.num_steps(len(dataset))
    return (
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


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
