"""Printing that never ends a run: a full disk or a closed pipe loses lines, and each next one is tried again."""

import io
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO


def say_lost(count: int) -> str:
    """What is printed once lines come through again."""
    return (
        f"standard output could not be written for a while: {count} {'line was' if count == 1 else 'lines were'} lost"
    )


class Printer:
    """A text stream whose failures are counted, not raised.

    Args:
        stream: where to; None: what `sys.stdout` is at the time of each text.
        say_lost: number of lines lost -> what is printed before the first line that comes through again.

    Note: a text goes straight to the file where the stream has one. Python's buffer would keep what failed, print some
        of the lost lines later, and raise once more when the process ends.
    """

    def __init__(self, stream: TextIO | None = None, say_lost: Callable[[int], str] = say_lost) -> None:
        self._fixed, self._say_lost = stream, say_lost
        self._failures = self._lost = 0
        self._torn = False
        """Whether the file ends within a line whose rest could not be written."""
        # The training thread, the saver and a live table print at the same time. A line's lock is taken first.
        self._line_lock, self._write_lock = threading.Lock(), threading.Lock()

    @property
    def encoding(self) -> str:
        """Of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # closed
            return False

    def line(self, text: str, show: Callable[[str], object] | None = None) -> None:
        """Print a line, and before it how many were lost.

        Args:
            text: without the newline.
            show: prints it through this stream; None: as it is.
        """
        with self._line_lock:
            before = self._failures
            whole = f"{self._say_lost(self._lost)}\n{text}" if self._lost else text
            if show is None:
                self.write(whole + "\n")
            else:
                show(whole)
            self._lost = self._lost + 1 if self._failures > before else 0

    def write(self, text: str) -> int:
        """Write a text; its length, as a file says."""
        with self._write_lock:
            try:
                self._send(self._stream, text)
            except (OSError, ValueError):  # ValueError: the stream is closed
                self._failures += 1
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""

    @property
    def _stream(self) -> TextIO | None:
        return self._fixed or sys.stdout

    def _send(self, stream: TextIO | None, text: str) -> None:
        if stream is None:  # the process was started with a closed stdout
            return
        # An unbuffered stream (PYTHONUNBUFFERED) has the raw one in the buffer's place.
        raw = getattr(stream.buffer, "raw", stream.buffer) if isinstance(stream, io.TextIOWrapper) else None
        stream.flush()  # what others have printed comes first
        if raw is None:
            stream.write(text)
            stream.flush()
            return
        self._send_raw(raw, text.encode(self.encoding, "backslashreplace"))

    def _send_raw(self, raw: Any, data: bytes) -> None:
        data, done = (b"\n" if self._torn else b"") + data, 0
        try:
            while done < len(data):
                written = raw.write(data[done:])
                if written is None:
                    raise BlockingIOError("the reader is behind")
                done += written
        finally:
            if done:
                self._torn = done < len(data) and not data[:done].endswith(b"\n")
