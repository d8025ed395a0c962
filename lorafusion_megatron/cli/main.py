"""The ``lorafusion-megatron`` command: finds the asked command's module and runs it."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from lorafusion_megatron.errors import UserError

PROGRAM = "lorafusion-megatron"
COMMANDS = {
    "validate": "check a run file, its model and its data; needs no GPU",
    "plan": "show the schedule of a run before it starts; needs no GPU",
    "train": "train the jobs of a run file",
    "status": "show how far a run is, from its folder",
    "export": "write a kept step of a job as a PEFT adapter",
    "merge": "merge an adapter into its base model",
    "bench": "measure kernels and whole steps on this machine",
    "job": "add, pause, resume, cancel or list jobs of a running run",
    "slurm": "start a run under SLURM",
}
"""Commands in the order in which they are listed -> what they do. Each has a module of its name beside this one with
``add_arguments(parser)`` and ``run(args) -> int``."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, rule="the command line is not valid", remedy=f"see {self.prog} --help")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        command: the one that is asked for. Only its module is imported, so that ``validate`` and ``plan`` start
            without torch and a command that lacks an optional package breaks no other.
    """
    parser = _Parser(
        prog=PROGRAM,
        description="Fine-tune many LoRA jobs at once on one frozen Megatron-Core model.",
        epilog=f"'{PROGRAM} COMMAND --help' tells more. Keys of a run file are overridden as trailing key=value.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, summary in COMMANDS.items():
        module = f"lorafusion_megatron.cli.{name}"
        if find_spec(module) is None:
            continue
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == command:
            found = importlib.import_module(module)
            found.add_arguments(sub)
            sub.set_defaults(run=found.run)
    return parser


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: words after the program's name; None: those of this process.

    Returns:
        The exit status: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C, or what the command documents.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = next((word for word in words if not word.startswith("-")), None)
        parser = build_parser(command)
        args, extra = parser.parse_known_args(words)
        # argparse takes trailing words in one piece: overrides that follow an option are left over.
        if extra and (not hasattr(args, "overrides") or not all(_is_override(word) for word in extra)):
            parser.error(f"unrecognized arguments: {' '.join(extra)}")
        if extra:
            args.overrides += extra
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except UserError as error:
        # Under torchrun every rank of a machine meets the same mistake: one line is enough.
        if os.environ.get("LOCAL_RANK", "0") == "0" or "LOCAL_WORLD_SIZE" not in os.environ:
            print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; without this the interpreter complains once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
