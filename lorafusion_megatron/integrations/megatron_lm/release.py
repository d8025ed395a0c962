"""Which Megatron release the patch layer was tested with, and whether the installed one has what it touches."""

import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ...errors import UserError

TESTED_RELEASE = "0.19.2"
"""Release of megatron-core, which ships megatron.training."""

SYMBOLS = {
    "megatron.training.training": (
        "build_train_valid_test_data_iterators",
        "checkpoint_and_decide_exit",
        "consume_seqlen_stats_in_iteration",
        "get_megatron_optimizer",
        "load_checkpoint",
        "pretrain",
        "save_checkpoint",
        "train_step",
        "training_log",
        "wrap_model_chunks_with_ddp",
    ),
    "megatron.training.initialize": ("_compile_dependencies",),
    "megatron.training.one_logger_utils": ("finish",),
    "megatron.training.models.dist_utils": ("_ddp_wrap",),
    "megatron.training.checkpointing": ("get_checkpoint_name", "get_checkpoint_tracker_filename"),
    "megatron.core.models.backends": ("LocalSpecProvider",),
    "megatron.core.num_microbatches_calculator": ("NumMicroBatchesCalculator", "_GLOBAL_NUM_MICROBATCHES_CALCULATOR"),
    "megatron.core.optimizer.optimizer": ("ChainedOptimizer",),
    "megatron.core.transformer.transformer_block": ("LayerNormImpl",),
}
"""Module -> what of it is replaced or called."""

PARAMETERS = {
    "train_step": ("forward_step_func", "data_iterator", "model", "optimizer", "config", "forward_backward_func"),
    "training_log": ("loss_dict", "total_loss_dict", "iteration", "is_first_iteration"),
    "save_checkpoint": ("iteration", "num_floating_point_operations_so_far"),
    "wrap_model_chunks_with_ddp": ("model_chunks",),
}
"""Function of megatron.training.training -> parameters that its stand-in counts on."""


def check_release() -> str | None:
    """Check that Megatron's training code can be patched.

    Returns:
        What to tell where another release than the tested one has all that is needed; None where it is that one.

    Raises:
        UserError: megatron.training is not installed, or lacks something; the message names the tested release.
    """
    remedy = f"install the tested release: pip install 'megatron-core[training]=={TESTED_RELEASE}'"
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        installed = "of a source tree"
    for name, symbols in SYMBOLS.items():
        try:
            module = import_module(name)
        except ImportError as error:
            raise UserError(
                f"megatron-core {installed}: {name} does not import ({error})",
                rule="the pretraining script's own Megatron is patched",
                remedy=remedy,
                key="--lorafusion-config",
            ) from None
        missing = [symbol for symbol in symbols if not hasattr(module, symbol)]
        if missing:
            raise _changed(installed, f"{name} has no {', '.join(missing)}", remedy)
    training = import_module("megatron.training.training")
    for name, parameters in PARAMETERS.items():
        there = inspect.signature(getattr(training, name)).parameters
        missing = [parameter for parameter in parameters if parameter not in there]
        if missing:
            raise _changed(installed, f"{name} takes no {', '.join(missing)}", remedy)
    if installed == TESTED_RELEASE:
        return None
    return f"megatron-core {installed} has what is needed; pretraining scripts were tested with {TESTED_RELEASE}"


def _changed(installed: str, what: str, remedy: str) -> UserError:
    return UserError(
        f"megatron-core {installed}: {what}",
        rule=f"the patch layer was tested with {TESTED_RELEASE}",
        remedy=remedy,
        key="--lorafusion-config",
    )
