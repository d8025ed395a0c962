"""Rows out of JSONL and JSON files, each with its place for messages."""

import gzip
import json
import stat
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

from lorafusion_megatron.errors import UserError


def read_rows(path: Path, *, key: str) -> Iterator[tuple[str, dict[str, object]]]:
    """The rows of a data file.

    Args:
        path: ``.jsonl`` (one object a line, blank lines skipped), ``.json`` (an array of objects, or JSONL), or
            either with ``.gz``.
        key: the YAML key that named it, for messages.

    Yields:
        (``file:line``, row); for an array ``file[index]``.

    Raises:
        UserError: the file is missing or unreadable, or a row is not a JSON object.
    """
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise UserError(
                f"{path} is a pipe or a device",
                rule="a data file is read more than once",
                remedy="write the rows to a file",
                key=key,
            )
        with _open(path) as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
        if start == "[" and ".json" in path.suffixes:
            yield from _array(path, key)
        else:
            yield from _lines(path, key)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})",
            rule="data files are JSONL in UTF-8",
            remedy="convert the file",
            key=key,
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"{path} cannot be read ({reason})",
            rule="a data file must exist and be whole",
            remedy="check the path",
            key=key,
        ) from None


def place_of(path: Path, row: int, *, key: str) -> str:
    """``file:line`` of a row of a file that was read before; reads it again, for messages of errors found late."""
    return next((place for place, _ in islice(read_rows(path, key=key), row, None)), str(path))


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _lines(path: Path, key: str) -> Iterator[tuple[str, dict[str, object]]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                place = f"{path}:{number}"
                yield place, _object(_parse(line, place, key), place, key)


def _array(path: Path, key: str) -> Iterator[tuple[str, dict[str, object]]]:
    with _open(path) as file:
        rows = _parse(file.read(), str(path), key)
    assert isinstance(rows, list)
    for index, row in enumerate(rows):
        place = f"{path}[{index}]"
        yield place, _object(row, place, key)


def _parse(text: str, place: str, key: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        given = f"{place} is not JSON ({error.msg} at column {error.colno})"
    except (RecursionError, ValueError):  # nesting beyond Python's stack; an integer beyond 4300 digits
        given = f"{place} is JSON that nests too deep or holds a number too long"
    raise UserError(given, rule="each row is one JSON object", remedy="mend or remove the row", key=key)


def _object(row: object, place: str, key: str) -> dict[str, object]:
    if isinstance(row, dict):
        return row
    raise UserError(
        f"{place} is a JSON {type(row).__name__}",
        rule="each row is one JSON object",
        remedy='write rows like {"prompt": "…", "completion": "…"}',
        key=key,
    )
