"""The ``lorafusion-megatron`` command: finds the asked command's module and runs it."""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn, TextIO

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
        The exit status: 0, 2 for bad input (one line on stderr), 1 where what is printed can't be written (one line
        too), 130 after Ctrl-C, or what the command documents. That of ``train`` is never changed by its output.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in words if not word.startswith("-")), None)
    try:
        status = _run(words, command)
    except UserError as error:
        # Under torchrun every rank of a machine meets the same mistake: one line is enough.
        if os.environ.get("LOCAL_RANK", "0") == "0" or "LOCAL_WORLD_SIZE" not in os.environ:
            _complain(str(error))
        status = 2
    except KeyboardInterrupt:
        status = 130
    except SystemExit:  # --help
        status = _written(0, command)
        if status:
            return status
        raise
    except Exception as error:
        # Training's own lines never raise.
        if isinstance(error, OSError) and command != "train" and _is_of_stdout(error):
            return _lost(error)
        _written(1, command)
        raise
    return _written(status, command)


def _run(words: Sequence[str], command: str | None) -> int:
    """Parse the words and run their command; its exit status."""
    parser = build_parser(command)
    args, extra = parser.parse_known_args(words)
    # argparse takes trailing words in one piece: overrides that follow an option are left over.
    if extra and (not hasattr(args, "overrides") or not all(_is_override(word) for word in extra)):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        args.overrides += extra
    status: int = args.run(args)
    return status


def _complain(text: str) -> None:
    """Print an error's line, where stderr is open and can be written."""
    if sys.stderr is None:
        return
    try:
        print(f"{PROGRAM}: error: {text}", file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def _is_of_stdout(error: OSError) -> bool:
    """Whether a command's error comes from stdout, which then can't be written now either."""
    if sys.stdout is None or error.filename is not None:  # files that are opened have a name in their errors
        return False
    if isinstance(error, BrokenPipeError):
        return True
    try:
        print(flush=True)  # an empty line, ahead of the traceback: an unbuffered stream has nothing left to flush
    except OSError:
        return True
    return False


def _written(status: int, command: str | None) -> int:
    """Write what is still in stdout's buffer; the exit status after that."""
    try:
        if sys.stdout is not None:  # None: the process was started with a closed stdout
            sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: it has been closed since
        if command != "train" and not status:
            return _lost(error)
        _drop(sys.stdout)
    return status


def _lost(error: OSError | ValueError) -> int:
    """Say that stdout can't be written; the exit status. A reader (head, less) that has gone has seen enough."""
    _drop(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return 0
    reason = error.strerror if isinstance(error, OSError) else error
    _complain(f"standard output can't be written ({reason}); make room, or send it elsewhere")
    return 1


def _drop(stream: TextIO) -> None:
    """Send what is left in a stream's buffer nowhere: the interpreter's last flush would fail and end with 120."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
