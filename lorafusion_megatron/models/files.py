"""Files that survive a crash, and folders that commands write to."""

import os
import shutil
from pathlib import Path

from lorafusion_megatron.errors import UserError


def flush(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_output(output: str | Path, size: int, *, key: str) -> Path:
    """Check that a folder of ``size`` bytes can be written, and make its parent.

    Args:
        output: folder to write, new or empty.
        size: bytes that will be written.
        key: where the folder was given, for messages.

    Returns:
        Its absolute path.

    Raises:
        UserError: it exists and holds something, its parent can't be made or written, or there is too little space.
    """
    folder = Path(os.path.abspath(output))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists", rule="nothing is overwritten", remedy="give a new or an empty folder", key=key
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder.parent} can't be made ({error.strerror})",
            rule="the output must be writable",
            remedy="give another folder",
            key=key,
        ) from None
    if not os.access(folder.parent, os.W_OK):
        raise UserError(
            f"{folder.parent} is not writable",
            rule="the output must be writable",
            remedy="give another folder",
            key=key,
        )
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise UserError(
            f"{folder.parent} has {free / 2**30:.1f} GiB left",
            rule=f"the output takes {size / 2**30:.1f} GiB",
            remedy="make room, or give a folder on another disk",
            key=key,
        )
    return folder
