"""Tokenized rows on disk: a data file is read once for all ranks, jobs and starts, and mapped into their memory.

    <save>/tokenized/<key>/    the rows of one data file, as `JobDataset.save` writes them

The key is a hash of all that the rows depend on: the data file, the tokenizer's files, the chat template, the limits of
the job, the code that reads them and the versions of its libraries. A file counts as the same while its size, times and
inode do.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import current_process
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from .. import data
from ..data import DataSource, JobDataset, load_dataset
from ..data.tokenizer import ADDITIONAL_TEMPLATES
from ..errors import UserError
from ..models.files import flush, temporary_folder

NAME = "tokenized"
SMALL = 1 << 20
"""Bytes of a data file below which its rows are not kept on disk: they are read in a fraction of a second."""
LARGE = 4 << 20
"""Bytes of a data file from which several processes tokenize: some seconds of one."""
MOST_WORKERS = 16
"""Processes that one reader can keep busy: it takes their rows out of JSON, which is a twentieth of the work."""
KEPT_SECONDS = 7 * 86400.0
"""Time without a use after which rows are removed."""
TOLD = 32 << 20
"""Bytes of a data file from which its reading, of half a minute or more, is told."""
_LIBRARIES = ("tokenizers", "transformers", "sentencepiece", "tiktoken", "jinja2")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5"}


class RowCache:
    """The data sets of a run on one rank.

    Jobs with the same rows share one data set. Without a folder, where the file system refuses, or for a tokenizer with
    code of its own (whose results depend on more than the files beside it) rows are in memory alone.

    Args:
        folder: where rows are kept; None: nowhere.
        write: whether rows that are not there yet are put there.
        rank, ranks: which of how many ranks this is.
        say: told of large files that this rank is about to read.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        write: bool = True,
        rank: int = 0,
        ranks: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._say = say
        self.folder, self._write, self._rank, self._ranks = folder, write, rank, ranks
        self.used: set[str] = set()
        """Keys of the rows that this rank has asked for."""
        self.trouble: str | None = None
        """Why rows could not be kept on disk, where that failed."""
        self._held: dict[tuple[str, Path], JobDataset] = {}
        """What `share_out` has read and could not keep on disk, until it is asked for."""
        self._made: set[str] = set()
        self._made_folders: list[Path] = []
        self._open_sets: WeakValueDictionary[tuple[str, Path], JobDataset] = WeakValueDictionary()
        self._model_files: dict[Path, Any] = {}

    def load(self, source: DataSource) -> JobDataset:
        """The rows of a data file; while another process reads the same one, this waits for it.

        Raises:
            UserError: as `load_dataset`.
        """
        key = self._key(source)
        if key is None:
            return _read(source)
        self.used.add(key)
        rows = self._held.pop((key, source.path), None) or self._open_sets.get((key, source.path))
        if rows is None:
            rows = self._rows(key, source)
            self._open_sets[key, source.path] = rows
        return rows

    def share_out(self, sources: Sequence[DataSource]) -> None:
        """Put rows on disk that are not there yet, those that no other process is at; each rank begins elsewhere.

        Errors in them are left for `load`, which comes upon them in the same order on every rank.
        """
        if self._ranks < 2 or not self._write or self.folder is None:
            return
        start = self._rank * len(sources) // self._ranks
        for source in (*sources[start:], *sources[:start]):
            key = self._key(source)
            if key is None or not self._is_kept(source) or self._mapped(key, source) is not None:
                continue
            self.used.add(key)
            with suppress(UserError), self._lock(key, wait=False) as ours:
                if ours and self._mapped(key, source) is None:  # it may have come while the lock was asked for
                    rows = self._make(key, source)
                    if self.trouble is not None:  # only this rank has it, and nothing is gained by going on
                        self._open_sets[key, source.path] = self._held[key, source.path] = rows
                        return

    def take_trouble(self) -> str | None:
        """What to tell of rows that could not be kept on disk since the last time; None where all were."""
        trouble, self.trouble = self.trouble, None
        if trouble is None:
            return None
        return f"tokenized rows can't be kept in {self.folder} ({trouble}): each rank reads all data and holds it"

    def drop_old(self) -> None:
        """Remove what nobody has used for `KEPT_SECONDS`: jobs that left, data that changed, what a kill left."""
        with suppress(OSError):
            for path in list(self.folder.iterdir()) if self.folder else []:
                key, age = path.name.lstrip(".").split(".")[0], time.time() - path.stat().st_mtime
                if key not in self.used and age > KEPT_SECONDS:
                    _remove(path)

    def discard(self) -> None:
        """Remove what this rank has put there: the run does not begin."""
        if self.folder is None:
            return
        for key in self.used:
            _remove(self.folder / f"{key}.lock")  # a process that waits for it reads for itself
            if key in self._made:
                _remove(self.folder / key)
        for folder in (self.folder, *reversed(self._made_folders)):
            with suppress(OSError):  # not empty: another process is at work
                folder.rmdir()

    def _rows(self, key: str, source: DataSource) -> JobDataset:
        rows = self._mapped(key, source)
        if rows is not None:
            return rows
        if not self._write or not self._is_kept(source):
            return _read(source)
        with self._lock(key, wait=False) as ours:
            if ours:
                rows = self._mapped(key, source)
                return self._make(key, source) if rows is None else rows
        with self._lock(key, wait=True):
            rows = self._mapped(key, source)
        # Those that the other one could not read or keep are read by all that waited at once, not in turn.
        return _read(source) if rows is None else rows

    def _is_kept(self, source: DataSource) -> bool:
        return self.folder is not None and _size(source) >= SMALL

    def _mapped(self, key: str, source: DataSource) -> JobDataset | None:
        """The rows on disk; None where they are missing or not whole."""
        if self.folder is None:
            return None
        try:
            rows = JobDataset.open(self.folder / key, source.path)
            with suppress(OSError):
                os.utime(self.folder / key)
            return rows
        except Exception:  # damaged files make NumPy raise many kinds
            return None

    def _make(self, key: str, source: DataSource) -> JobDataset:
        """Read the data file and keep its rows."""
        assert self.folder is not None
        size = _size(source)
        if size >= TOLD and self._say is not None:
            self._say(f"rank {self._rank} reads {source.path} ({size / 1e6:.0f} MB)")
        rows = _read(source)
        if self._key(source) != key:  # it changed while it was read
            return rows
        target, failure = self.folder / key, None
        try:
            if self._mapped(key, source) is None:
                _remove(target)  # what is there is not whole
            with temporary_folder(target) as temporary:
                rows.save(temporary)
                for path in (*temporary.iterdir(), temporary):
                    flush(path)
                temporary.rename(target)
            self._made.add(key)
        except OSError as error:
            failure = error.strerror or str(error)
        mapped = self._mapped(key, source)
        if mapped is None:
            self.trouble = failure
            return rows
        return mapped  # another process's, where there are no locks and it was faster

    @contextmanager
    def _lock(self, key: str, *, wait: bool) -> Iterator[bool]:
        """Keep other processes from reading the same file; False where another one has it and ``wait`` is false.

        Where the file system has no locks, or can't be written, each process reads for itself, and the first one's rows
        stay.
        """
        assert self.folder is not None
        ours = True
        with ExitStack() as stack:
            try:
                self._make_folder()
                file = stack.enter_context((self.folder / f"{key}.lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                ours = False
            except OSError:
                pass
            yield ours

    def _make_folder(self) -> None:
        assert self.folder is not None
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made_folders += reversed(missing)

    def _key(self, source: DataSource) -> str | None:
        """What the rows of a source are known by; None where they can't be."""
        if source.trust_remote_code:
            return None
        try:
            if source.model not in self._model_files:
                self._model_files[source.model] = sorted(
                    (path.name, *_stamp(path))
                    for path in (*source.model.iterdir(), *source.model.glob(f"{ADDITIONAL_TEMPLATES}/*.jinja"))
                    if path.is_file() and path.suffix not in _WEIGHTS
                )
            template = source.chat_template
            parts = {
                "code": _code(),
                "file": [*_stamp(source.path), source.path.suffixes],
                "model": self._model_files[source.model],
                "limits": [source.vocab_size, source.max_length, source.truncate],
                "template": template if template is None or "{" in template else _stamp(Path(template)),
            }
        except (OSError, ValueError):  # what is missing is told when it is read
            return None
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read(source: DataSource) -> JobDataset:
    """Read a data file, a large one with a quarter of the machine's processors: other ranks may read others."""
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 4)
    several = _size(source) >= LARGE and workers > 1 and not current_process().daemon
    return load_dataset(source, workers=workers if several else 1)


def _size(source: DataSource) -> int:
    """Bytes of a data file; 0 where it is missing, which is told when it is read."""
    try:
        return source.path.stat().st_size
    except OSError:
        return 0


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """What a file is known by: it changes with whatever is written to it or put in its place."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@cache
def _code() -> str:
    """What the code that reads data is known by: its text, and the versions of its libraries."""
    text = hashlib.sha256()
    for path in sorted(Path(data.__file__).parent.glob("*.py")):
        text.update(path.read_bytes())
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            text.update(f"{name}={version(name)};".encode())
    return text.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
