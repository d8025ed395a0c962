"""Megatron's ``--save`` and ``--load`` for a run of jobs: the jobs' state in Megatron's layout of folders.

    SAVE/latest_checkpointed_iteration.txt       Megatron's tracker file
    SAVE/iter_0000003/megatron.json              iteration, samples, floating-point operations
    SAVE/iter_0000003/00000007/...               the jobs' state, as `training.state` writes it
    SAVE/.iter_0000003.old                       what an iteration that is written again replaces, for a moment

The base model is frozen and not written again. A folder is written under a temporary name, flushed and renamed, and the
tracker is replaced last, so that it never names a checkpoint that is not whole. An iteration that is written again is
first renamed; where a run was killed before the new one had its name, the old one is found.
"""

import json
import math
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

from ...errors import UserError
from ...mcore.parallel import Groups
from ...models.files import flush, temporary_folder
from ...training.output import replace_text, write_json
from ...training.sequences import sequences

COUNTS = "megatron.json"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What Megatron's loop counts."""

    iteration: int
    """Windows done."""
    consumed_train_samples: int
    num_floating_point_operations_so_far: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint to begin from."""

    folder: Path
    counts: Counts


def write_checkpoint(save: str, state: Path, counts: Counts, note: Callable[[str], None]) -> bool:
    """Copy a state of the jobs into Megatron's layout (rank 0).

    Returns:
        Whether it is there; a full disk is told and survived.
    """
    folder = Path(get_checkpoint_name(save, counts.iteration, return_base_dir=True))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of the folder above: its leftovers are those of every iteration.
        with temporary_folder(folder.parent) as temporary:
            new = temporary / folder.name
            shutil.copytree(state, new / state.name)
            write_json(new / COUNTS, vars(counts))
            for path in (*new.rglob("*"), new):
                flush(path)
            _replace(folder, new)
        replace_text(Path(get_checkpoint_tracker_filename(save)), str(counts.iteration))
        flush(folder.parent)
        for old in folder.parent.glob(".iter_*.old"):
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        note(f"checkpoint of iteration {counts.iteration} could not be saved to {save} ({error}); the run goes on")
        return False
    note(f"saved checkpoint of iteration {counts.iteration} to {folder}")
    return True


def find_checkpoint(args: Namespace) -> Found | None:
    """The checkpoint that the tracker under ``--load`` names; None without the option or a tracker.

    Raises:
        UserError: the tracker or the folder is not one of ours or is damaged, or ``--exit-on-missing-checkpoint`` finds
            none.
    """
    if args.load is None:
        return None
    tracker = Path(get_checkpoint_tracker_filename(args.load))
    try:
        name = tracker.read_text().strip()
    except FileNotFoundError:
        if args.exit_on_missing_checkpoint:
            raise _unusable(f"{tracker} does not exist", "--exit-on-missing-checkpoint asks for a checkpoint") from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(f"{tracker} can't be read ({_why(error)})", "it holds the number of an iteration") from None
    folder = None
    if re.fullmatch("[0-9]{1,12}", name):
        folder = Path(get_checkpoint_name(args.load, int(name), return_base_dir=True))
        if not folder.exists() and _aside(folder).is_dir():
            folder = _aside(folder)
    if folder is None or not (folder / COUNTS).is_file():
        raise _unusable(f"{tracker} names {name!r}", "it must name a checkpoint of jobs, which holds " + COUNTS)
    if not sequences(folder):
        raise _unusable(f"{folder} holds no state", f"the jobs' state lies beside {COUNTS}, in a folder with a number")
    return Found(folder=folder, counts=read_counts(folder / COUNTS))


def read_counts(file: Path) -> Counts:
    """What Megatron had counted at a checkpoint.

    Raises:
        UserError: the file is damaged.
    """
    try:
        value = json.loads(file.read_text())
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
        for field in fields(Counts):
            number: Any = value.get(field.name)
            # bool is an int to Python; the parser takes NaN and Infinity.
            if type(number) not in (int, field.type) or not math.isfinite(number) or number < 0:
                raise ValueError(f"{field.name} is {number!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(f"{file} can't be read ({_why(error)})", "it holds what Megatron's loop had counted") from None
    return Counts(**{field.name: value[field.name] for field in fields(Counts)})


def agree(found: Found | None, groups: Groups) -> None:
    """Check that every rank begins where rank 0 does; every rank calls it.

    Raises:
        UserError: one finds another checkpoint, or none: its host does not see the same folder.
    """
    everyone = groups.gather(None if found is None else found.counts)
    error = None
    if everyone is not None and any(counts != everyone[0] for counts in everyone):
        seen = ["no checkpoint" if counts is None else f"iteration {counts.iteration}" for counts in everyone]
        other = next(rank for rank, counts in enumerate(everyone) if counts != everyone[0])
        error = UserError(
            f"rank 0 finds {seen[0]}, rank {other} {seen[other]}",
            rule="all ranks begin from one checkpoint",
            remedy="give a folder that every host sees, whole",
            key="--load",
        )
    if (error := groups.broadcast(error)) is not None:
        raise error


def _replace(folder: Path, new: Path) -> None:
    """Give a whole checkpoint its name. At every moment it, or what it replaces, is whole under a name that is read."""
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    try:
        new.rename(folder)
    except OSError:
        with suppress(OSError):
            aside.rename(folder)
        raise
    flush(folder.parent)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _unusable(given: str, rule: str) -> UserError:
    return UserError(
        given,
        rule=rule,
        remedy="load what --save of a run of jobs wrote (the base model comes from base_model.path), or remove --load",
        key="--load",
    )
