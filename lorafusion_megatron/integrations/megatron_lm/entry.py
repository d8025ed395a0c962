"""The two functions that a pretraining script calls."""

import os
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import UserError

if TYPE_CHECKING:
    from .session import Session


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the options of this package to Megatron's parser: an ``extra_args_provider``.

    A script with a provider of its own calls it there: ``lorafusion.add_arguments(parser)``.
    """
    group = parser.add_argument_group(title="lorafusion")
    group.add_argument(
        "--lorafusion-config",
        metavar="RUN.yaml",
        action=_RunFile,
        help="Train the LoRA jobs of this run file on the frozen base model instead of pretraining.",
    )
    group.add_argument(
        "--lorafusion-set",
        metavar="KEY=VALUE",
        nargs="*",
        action="extend",
        default=[],
        help="Override keys of the run file; may be given more than once.",
    )
    return parser


def enable(args: Namespace) -> None:
    """Make the coming ``pretrain(...)`` a run of the jobs that ``--lorafusion-config`` names; nothing without it.

    Call it once the arguments are parsed and before anything is made from them. A second call changes nothing.

    Args:
        args: Megatron's parsed and validated arguments. What the run file decides is set in them: data, batch sizes,
            number of iterations, learning rate.

    Note:
        A mistake of the user's (an option that can't be obeyed, a run file that doesn't fit the base model, a release
        that lacks a symbol) ends the process with one line and exit status 2 before any process group is made.
    """
    if getattr(args, "lorafusion_config", None) is None:
        return
    if _installed() is None:
        with one_line_errors():
            _start(args)


def disable() -> None:
    """Put Megatron back as it was; nothing where no run is enabled."""
    if (session := _installed()) is not None:
        session.close()


class _RunFile(Action):
    """Takes the run file's path. Megatron validates its arguments next, which must work without a GPU too."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        from . import cpu

        setattr(namespace, self.dest, values)
        cpu.relax_validation()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake ends the process with one line on stderr, from one rank of a host."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"lorafusion-megatron: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _installed() -> "Session | None":
    """The enabled run: Megatron's training step is its method then."""
    step = getattr(sys.modules.get("megatron.training.training"), "train_step", None)
    owner = getattr(step, "__self__", None)
    return owner if type(owner).__module__ == f"{__package__}.session" else None


def _start(args: Namespace) -> None:
    from .release import check_release

    notes = [note for note in [check_release()] if note]
    from ...config import load_run
    from ...training.setup import prepare
    from .layout import run_with_layout
    from .model_options import check_model_options
    from .options import check_options
    from .session import Session

    check_options(args)
    run = run_with_layout(load_run(args.lorafusion_config, args.lorafusion_set), args)
    prepared = prepare(run)
    check_model_options(args, prepared.spec, run)
    Session(args, replace(prepared, notes=(*notes, *prepared.notes))).open()
