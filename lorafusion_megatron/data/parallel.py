"""Rows of one file tokenized by several processes, in the order of the file.

These are plain processes and not `multiprocessing`'s, which would import the program that started this one again, with
all that it imports. They know no torch.
"""

import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from lorafusion_megatron.data.conversion import same_imports
from lorafusion_megatron.data.dataset import DatasetBuilder
from lorafusion_megatron.data.encode import Row, encode_rows
from lorafusion_megatron.data.rows import FirstRow, RowTokenizer
from lorafusion_megatron.data.source import DataSource
from lorafusion_megatron.errors import UserError

CHUNK = 128
"""Rows that go to a process at a time: a tenth of a second of its work."""


class WorkerLostError(Exception):
    """A process ended before its work did."""


def encode_apart(rows: Iterable[Row], source: DataSource, first: FirstRow, *, workers: int) -> Iterator[DatasetBuilder]:
    """`encode_rows` by several processes.

    Args:
        rows: those after the first one.
        source: the file.
        first: what its first row told.
        workers: processes.

    Yields:
        The rows as parts of a data set, in order.

    Raises:
        UserError: the error that comes first in the file, of a row or of reading it.
        WorkerLostError: a process was killed or can't be started.
    """
    with ExitStack() as stack:
        free = deque(stack.enter_context(_Worker()) for _ in range(workers))
        start = pickle.dumps((source, first))
        for worker in free:  # all are starting by now
            worker.send(start)
        at_work: deque[_Worker] = deque()
        failure = None
        for chunk, trouble in _chunks(rows):
            failure = trouble  # after the rows before it
            if not free:
                free.append(at_work.popleft())
                yield free[0].receive()
            worker = free.popleft()
            worker.send(pickle.dumps(chunk))
            at_work.append(worker)
        while at_work:
            yield at_work.popleft().receive()
        if failure is not None:
            raise failure


def _chunks(rows: Iterable[Row]) -> Iterator[tuple[list[Row], UserError | None]]:
    """Rows in chunks; with the last one what kept the file from being read on."""
    chunk: list[Row] = []
    failure = None
    reader = iter(rows)
    while True:
        try:
            row = next(reader, None)
        except UserError as error:
            row, failure = None, error
        if row is not None:
            chunk.append(row)
        if row is None or len(chunk) == CHUNK:
            yield chunk, failure
            chunk = []
        if row is None:
            return


class _Worker:
    """One process; it holds one chunk at a time, so that neither side waits for the other to read."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        words = [sys.executable, "-P", "-c", f"from {__name__} import main; main({theirs.fileno()})"]
        try:
            self._process = subprocess.Popen(
                words, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=same_imports()
            )
        except OSError:
            raise WorkerLostError from None
        finally:
            theirs.close()

    def send(self, pickled: bytes) -> None:
        """Give it a chunk, or what it needs to know before the first one."""
        try:
            self._pipe.send_bytes(pickled)
        except OSError:
            raise WorkerLostError from None

    def receive(self) -> DatasetBuilder:
        """What it made of its chunk; raises the error that it met."""
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerLostError from None
        if isinstance(answer, UserError):
            raise answer
        assert isinstance(answer, DatasetBuilder)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def main(descriptor: int) -> None:
    """Tokenize what comes over a pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's: the process that started this one ends it
    pipe = Connection(descriptor)
    with suppress(EOFError, OSError):
        source, first = pipe.recv()
        tokenizer = RowTokenizer(source, like=first)
        while True:
            part = DatasetBuilder()
            try:
                encode_rows(pipe.recv(), tokenizer, source, part)
            except UserError as error:
                pipe.send(error)
            else:
                pipe.send(part)
