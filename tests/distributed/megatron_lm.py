"""Megatron-LM pretraining scripts in the ranks of a test, and what they look at there."""

import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorafusion_megatron.config import load_run
from lorafusion_megatron.integrations.megatron_lm.model_options import command_line
from lorafusion_megatron.models.config import read_model_spec
from tests.launch import Finished, Ranks

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "pretrain_gpt_lora.py"
PROVIDER_SCRIPT = Path(__file__).with_name("pretrain_with_provider.py")


def model_words(run_file: Path) -> list[str]:
    """Megatron's options for the base model of a run file in fp32."""
    run = load_run(run_file)
    return command_line(read_model_spec(run.base_model.path), run)


def start(
    script: Path,
    run_file: Path,
    out: Path,
    *words: str,
    world: int = 1,
    overrides: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    run: Callable[[str, list[str]], int] | None = None,
) -> Ranks:
    """``torchrun --nproc-per-node WORLD SCRIPT MODEL OPTIONS --lorafusion-config RUN_FILE WORDS``; see `run_script`."""
    ours = ["--lorafusion-config", str(run_file), "--lorafusion-set", f"checkpoint.save={out}", *overrides]
    line = [*model_words(run_file), "--log-interval", "1", *ours, *words]
    folder = out.with_name(f"{out.name}.logs")
    return Ranks(run or run_script, (str(script), line), world=world, folder=folder, environment=environment)


def pretrain(*arguments: Any, **named: Any) -> Finished:
    """`start`, to its end."""
    return start(*arguments, **named).wait(180.0)


def run_in_folder(folder: str, script: str, words: list[str]) -> int:
    """Run a script as its own main program in a folder; its exit status."""
    os.chdir(folder)
    return run_script(script, words)


def run_script(script: str, words: list[str]) -> int:
    """Run a script as its own main program; its exit status."""
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def run_clamped(script: str, words: list[str]) -> int:
    """`run_script` where the script's model provider builds a configuration of its own."""
    from megatron.training import arguments

    original = arguments.core_transformer_config_from_args

    def clamped(*arguments: Any, **named: Any) -> Any:
        config = original(*arguments, **named)
        config.activation_func_clamp_value = 0.1
        return config

    arguments.core_transformer_config_from_args = clamped
    return run_script(script, words)


def run_on_a_full_disk(script: str, words: list[str]) -> int:
    """`run_script` where the adapter of the job "second" can't be written."""
    from lorafusion_megatron.training import checkpoints

    write = checkpoints.write_adapter

    def full(folder: Path, *rest: Any) -> None:
        if folder.name == "second":
            raise OSError(28, "No space left on device")
        write(folder, *rest)

    checkpoints.write_adapter = full
    return run_script(script, words)


def run_and_stop_while_it_settles(script: str, words: list[str]) -> int:
    """`run_script`, with a signal between the model's construction and Megatron's loop."""
    from lorafusion_megatron.training.trainer import Trainer

    settle = Trainer.settle

    def stopped(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        settle(trainer)

    Trainer.settle = stopped
    return run_script(script, words)


def run_loading(script: str, words: list[str]) -> int:
    """`run_script`, with a ``--load`` of each rank's own in place of the word LOAD."""
    return run_script(script, [word.replace("LOAD", f"load{os.environ['RANK']}") for word in words])


def state_of_megatron() -> dict[tuple[str, str], int]:
    """(module or class, attribute) -> identity, of everything that the patch layer may touch."""
    import megatron.core.models.backends as backends
    import torch
    from megatron.core import num_microbatches_calculator
    from megatron.core import utils as core_utils
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import transformer_block, utils
    from megatron.training import arguments, checkpointing, initialize, training
    from megatron.training.models import dist_utils, gpt
    from megatron.training.utils import common_utils

    owners: list[Any] = [
        *(training, initialize, dist_utils, gpt, arguments, checkpointing, num_microbatches_calculator, common_utils),
        *(backends, backends.LocalSpecProvider, transformer_block, utils, schedules, random),
        *(core_utils, torch, torch.cuda, torch.nn.Module, torch.Tensor),
    ]
    return {(owner.__name__, name): id(value) for owner in owners for name, value in vars(owner).items()}


def enabling_and_disabling(words: list[str], run_words: list[str]) -> int:
    """Parse without and with a run file; Megatron must be as it was without one, and after `disable`."""
    from megatron.training import global_vars, training
    from megatron.training.arguments import parse_and_validate_args

    from lorafusion_megatron.integrations import megatron_lm as lorafusion

    # A first parse, so that whatever Megatron makes lazily is there.
    ordinary = [*words, "--global-batch-size", "1", "--train-iters", "1", "--lr", "1e-3"]
    sys.argv = ["script", *ordinary]
    parse_and_validate_args(extra_args_provider=lorafusion.add_arguments)
    global_vars.unset_global_variables()
    calculator = ("megatron.core.num_microbatches_calculator", "_GLOBAL_NUM_MICROBATCHES_CALCULATOR")

    before = state_of_megatron()
    args = parse_and_validate_args(extra_args_provider=lorafusion.add_arguments)
    given = dict(vars(args))
    lorafusion.enable(args)
    after = state_of_megatron()
    assert args.lorafusion_config is None
    assert {key for key in before if before[key] != after.get(key)} == {calculator}  # parsing makes it
    assert vars(args) == given
    global_vars.unset_global_variables()

    sys.argv = ["script", *words, *run_words]
    args = parse_and_validate_args(extra_args_provider=lorafusion.add_arguments)
    with_calculator = state_of_megatron()[calculator]
    lorafusion.enable(args)
    step = training.train_step
    enabled = state_of_megatron()
    changed = {name for key in before if before[key] != enabled.get(key) for name in [key[1]]}
    assert {"train_step", "save_checkpoint", "wrap_model_chunks_with_ddp", "_ddp_wrap", "core_attention"} <= changed
    lorafusion.enable(args)
    assert training.train_step == step
    assert {key for key in enabled if enabled[key] != state_of_megatron().get(key)} == set()
    lorafusion.disable()
    restored = state_of_megatron()
    assert {key for key in before if before[key] != restored.get(key)} == {calculator}
    assert set(restored) == set(before)
    assert restored[calculator] == with_calculator
    lorafusion.disable()
    return 0
