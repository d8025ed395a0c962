"""One run a folder: a second one would mix its checkpoints, adapters and metrics with the first's."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from ..errors import UserError

NAME = "run.lock"
_held: dict[Path, TextIO] = {}
"""Locked file of each folder that this process runs in: as `flock` has it, a process never locks itself out."""


def lock_folder(folder: Path, note: Callable[[str], None]) -> None:
    """Take a run's folder for this process (rank 0) until it ends or calls `unlock_folder`.

    ``flock`` on ``run.lock``: the kernel lets go of it when the process ends, however it ends, and Linux passes it on
    to other hosts over NFS. A file system without such locks is told about and used without.

    Args:
        folder: the run's folder; made where it is missing.
        note: told where the file system has no locks.

    Raises:
        UserError: another process has the folder, or it can't be written.
    """
    path = (folder / NAME).resolve()
    if path in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({error})",
            rule="the run is written there",
            remedy="choose another",
            key="checkpoint.save",
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{folder} is in use by {holder}",
                rule="a folder holds one run at a time",
                remedy="wait until that run has ended, stop it, or choose another folder",
                key="checkpoint.save",
            ) from None
        note(f"{path.parent} has no file locks ({error}): a second run there would not be noticed")
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
    _held[path] = file


def unlock_folder(folder: Path) -> None:
    """Give a run's folder back; nothing where this process does not hold it. The file stays: removing it would race."""
    file = _held.pop((folder / NAME).resolve(), None)
    if file is not None:
        file.close()
