"""Files that survive a crash, folders that commands write to, and why something can't be read."""

import errno
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorafusion_megatron.errors import UserError

_OWNER = re.compile(r"(?P<where>.+)-(?P<pid>\d{1,9})\.[0-9a-f]{8}")
_NAME_BYTES = 255
_STALE_SECONDS = 86400.0
"""Age from which a temporary folder of another machine is taken for a leftover."""


def flush(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_fault(folder: str | Path, *, listed: bool = False) -> str | None:
    """What keeps a folder from being used, in the words of a message; None where nothing does.

    Path.is_dir does not serve: it raises where a folder above may not be entered or a name is too long.

    Args:
        folder: the folder.
        listed: whether its names will be asked for too.
    """
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            return "is not a directory"
        if listed:
            os.scandir(folder).close()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a text that is no path
        return "is not a directory"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return None


def read_fault(file: Path, error: Exception) -> str:
    """Why reading a file failed with ``error``.

    safetensors says of whatever it can't open that there is no such file, so the system is asked once more.
    """
    try:
        file.open("rb").close()
    except OSError as found:
        error = found
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def prepare_output(output: str | Path, size: int, *, key: str) -> Path:
    """Check that a folder of ``size`` bytes can be written, and make its parent.

    Args:
        output: folder to write, new or empty; a link leads to the folder that it names.
        size: bytes that will be written.
        key: where the folder was given, for messages.

    Returns:
        Its real path.

    Raises:
        UserError: it exists and holds something, its parent can't be made or written, or there is too little space.
    """
    folder = Path(os.path.realpath(output))
    try:
        if len(os.fsencode(folder.name)) > _NAME_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        _remove_leftovers(folder)
        exists = folder.is_dir()
        # lexists: what is a link still is one of a loop.
        if any(folder.iterdir()) if exists else os.path.lexists(folder):
            raise UserError(
                f"{folder} exists", rule="nothing is overwritten", remedy="give a new or an empty folder", key=key
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as temporary:  # the proof that it works
            place, free = temporary.parent, shutil.disk_usage(temporary).free
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({error.strerror})",
            rule="the output must be writable",
            remedy="give another folder",
            key=key,
        ) from None
    if free < size:
        raise UserError(
            f"{place} has {free / 2**30:.1f} GiB left",
            rule=f"the output takes {size / 2**30:.1f} GiB",
            remedy="make room, or give a folder on another disk",
            key=key,
        )
    return folder


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder on the file system of ``folder``, with the rights that the umask leaves; removed at the end.

    It is in ``folder`` where that exists, which may be a mount point, and else beside it. Those of processes that
    were killed are removed first.
    """
    _remove_leftovers(folder)
    place = folder if folder.is_dir() else folder.parent
    # Not mkdtemp, which makes folders that only their owner may read.
    temporary = place / f"{_prefix(folder)}{_where()}-{os.getpid()}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prefix(folder: Path) -> str:
    """What the names of a folder's temporary ones begin with; short, since a name has at most 255 bytes."""
    return f".{os.fsencode(folder.name)[:100].decode(errors='ignore')}."


def _where() -> str:
    """The machine and the name space of its process numbers: containers of one host name may share a disk."""
    space = 0
    with suppress(OSError):
        space = os.stat("/proc/self/ns/pid").st_ino
    return f"{socket.gethostname()[:64]}-{space}"


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of ``folder`` whose process is gone."""
    prefix = _prefix(folder)
    for place in (folder, folder.parent):
        paths: list[Path] = []
        with suppress(OSError):  # nothing there, or it may be written but not listed
            paths = [path for path in place.iterdir() if path.name.startswith(prefix)]
        for path in paths:
            owner = _OWNER.fullmatch(path.name.removeprefix(prefix))
            # rmtree follows no link.
            if owner and _is_gone(path, owner["where"], int(owner["pid"])):
                shutil.rmtree(path, ignore_errors=True)


def _is_gone(path: Path, where: str, pid: int) -> bool:
    if where == _where():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
    with suppress(OSError):
        changed = max(file.stat().st_mtime for file in (path, *path.iterdir()))
        return time.time() - changed > _STALE_SECONDS
    return False
