"""How the script's own options lay the model out; the run file's ``model`` section yields to them."""

from argparse import Namespace
from dataclasses import replace

from ...config.run import ModelConfig, RunConfig
from ...errors import UserError

OPTIONS = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "virtual_pipeline_model_parallel_size": "--num-virtual-stages-per-pipeline-rank",
    "sequence_parallel": "--sequence-parallel",
    "recompute_granularity": "--recompute-granularity",
}
"""Key of the ``model`` section, and attribute of Megatron's arguments -> option."""


def run_with_layout(run: RunConfig, args: Namespace) -> RunConfig:
    """The run with the script's layout in place of its ``model`` section.

    A key that the run file leaves at its default follows the script; one that says something else than the script
    is a mistake, since only one of them can be right.

    Raises:
        UserError: the run file says one layout and the script another.
    """
    default = ModelConfig()
    for name, option in OPTIONS.items():
        ours, theirs = getattr(run.model, name), getattr(args, name)
        if ours not in (getattr(default, name), theirs):
            raise UserError(
                f"model.{name} is {ours} in the run file and {theirs} by the script's options",
                rule="in a pretraining script its own options lay the model out",
                remedy="remove the key from the run file, or make them equal",
                key=option,
            )
    if run.model.pipeline_layout != default.pipeline_layout:
        raise UserError(
            f"got {list(run.model.pipeline_layout)}",
            rule="in a pretraining script its own options lay the model out",
            remedy="remove the key and give --pipeline-model-parallel-layout",
            key="model.pipeline_layout",
        )
    layout = {name: getattr(args, name) for name in OPTIONS}
    if args.transformer_impl == "local":
        layout["transformer_impl"] = "local"
    return replace(run, model=replace(run.model, **layout))
