"""Megatron's ``--save`` and ``--load`` for a run of jobs: the jobs' state in Megatron's layout of folders.

    SAVE/latest_checkpointed_iteration.txt       Megatron's tracker file
    SAVE/iter_0000003/megatron.json              iteration, samples, floating-point operations
    SAVE/iter_0000003/00000007/...               the jobs' state, as `training.state` writes it

The base model is frozen and not written again. A folder is written under a temporary name and renamed, and the tracker
is replaced last, so that it never names a checkpoint that is not whole.
"""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

from ...errors import UserError
from ...training.output import write_json

COUNTS = "megatron.json"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What Megatron's loop counts."""

    iteration: int
    """Windows done."""
    consumed_train_samples: int
    num_floating_point_operations_so_far: float


def write_checkpoint(save: str, state: Path, counts: Counts, note: Callable[[str], None]) -> None:
    """Copy a state of the jobs into Megatron's layout (rank 0); a full disk is told and survived."""
    folder = Path(get_checkpoint_name(save, counts.iteration, return_base_dir=True))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(state, temporary / state.name)
        write_json(temporary / COUNTS, vars(counts))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        tracker = Path(get_checkpoint_tracker_filename(save))
        beside = tracker.with_name(f".{tracker.name}.{os.getpid()}")
        beside.write_text(str(counts.iteration))
        beside.replace(tracker)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        note(f"checkpoint of iteration {counts.iteration} could not be saved to {save} ({error}); the run goes on")
        return
    note(f"saved checkpoint of iteration {counts.iteration} to {folder}")


def find_checkpoint(args: Namespace) -> Path | None:
    """The folder that the tracker under ``--load`` names; None without the option or a tracker.

    Raises:
        UserError: the tracker or the folder is not one of ours, or ``--exit-on-missing-checkpoint`` finds none.
    """
    if args.load is None:
        return None
    tracker = Path(get_checkpoint_tracker_filename(args.load))
    if not tracker.is_file():
        if args.exit_on_missing_checkpoint:
            raise _unusable(f"{tracker} does not exist", "--exit-on-missing-checkpoint asks for a checkpoint")
        return None
    name = tracker.read_text().strip()
    folder = Path(get_checkpoint_name(args.load, int(name), return_base_dir=True)) if name.isdigit() else None
    if folder is None or not (folder / COUNTS).is_file():
        raise _unusable(f"{tracker} names {name!r}", "it must name a checkpoint of jobs, which holds " + COUNTS)
    return folder


def read_counts(folder: Path) -> Counts:
    """What Megatron had counted at a checkpoint."""
    return Counts(**json.loads((folder / COUNTS).read_text()))


def _unusable(given: str, rule: str) -> UserError:
    return UserError(
        given,
        rule=rule,
        remedy="load what --save of a run of jobs wrote (the base model comes from base_model.path), or remove --load",
        key="--load",
    )
