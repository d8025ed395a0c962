"""Which checkpoints a state folder holds, by their names alone; needs no torch."""

import re
from pathlib import Path

_NAME = re.compile(r"[0-9]{8,}")


def sequences(folder: Path) -> list[int]:
    """Numbers of the checkpoints in a state folder, newest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), reverse=True)


def checkpoint_folder(folder: Path, sequence: int) -> Path:
    """The folder of one of them."""
    return folder / f"{sequence:08d}"
