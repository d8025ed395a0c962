"""A full disk or a closed pipe behind stdout loses lines and ends no run."""

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafusion_megatron.training.printing import Printer
from lorafusion_megatron.training.progress import JsonLines, Lines, LiveTable, Progress, make_progress
from lorafusion_megatron.types import Schedule, StepReport

EMPTY = Schedule(replicas=((),), step_ends=(), distance=1, token_capacity=16, padding_multiple=1)
LOST = "standard output could not be written for a while: {} lost"


class Flaky(io.StringIO):
    """A terminal whose disk is full while it is told so."""

    full = False

    def write(self, text: str) -> int:
        """Take a text, or not."""
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)

    def isatty(self) -> bool:
        """As a terminal says."""
        return True


def tell_everything(log: Progress) -> None:
    """Everything that a progress is told in a run."""
    log.window(EMPTY, [])
    log.step(StepReport(job=0, step=1, loss=0.5, grad_norm=1.0, lr=0.1, skipped=True), name="a", total=2, tokens=3)
    log.window_done(bubble_share=0.5, seconds=1.0)
    log.note("a note")


def gone(tmp_path: Path) -> io.TextIOWrapper:
    """A pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full(tmp_path: Path) -> io.TextIOWrapper:
    """A file on a full disk; a write is kept in the buffer, flushing raises."""
    return open("/dev/full", "w")


def closed(tmp_path: Path) -> io.TextIOWrapper:
    """A stream that somebody has closed."""
    file = (tmp_path / "closed").open("w")
    file.close()
    return file


@pytest.mark.parametrize("make", [Lines, JsonLines, LiveTable])
@pytest.mark.parametrize("broken", [gone, full, closed])
def test_no_progress_raises_where_stdout_is_broken(
    make: Callable[[], Progress],
    broken: Callable[[Path], io.TextIOWrapper],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = broken(tmp_path)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws the table as in a terminal
    log = make()
    tell_everything(log)
    log.close()
    assert sys.stdout is stream
    stream.close()  # a buffer that still holds something would raise here, and again as the process ends


def test_the_first_line_that_comes_through_says_how_many_were_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Flaky()
    monkeypatch.setattr(sys, "stdout", stream)
    log = Lines()
    log.note("one")
    stream.full = True
    tell_everything(log)
    stream.full = False
    log.note("two")
    log.note("three")
    assert stream.getvalue().splitlines() == ["one", LOST.format("4 lines were"), "two", "three"]


def test_json_lines_say_it_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Flaky()
    monkeypatch.setattr(sys, "stdout", stream)
    log = JsonLines()
    stream.full = True
    log.note("one")
    stream.full = False
    log.note("two")
    log.note("three")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {line["event"] for line in lines} == {"note"}
    assert [line["text"] for line in lines] == [LOST.format("1 line was"), "two", "three"]


def test_a_live_table_goes_on_and_says_it_above_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Flaky()
    monkeypatch.setattr(sys, "stdout", stream)
    log = make_progress(is_first=True, log_interval=1)
    assert isinstance(log, LiveTable)
    stream.full = True
    tell_everything(log)
    log.note("one")
    stream.full = False
    # The table is drawn by a thread of its own, whose failure may be counted with a note's.
    log.note("two [/gloo/pair.cc:547] :boom:")
    log.note("three")
    log.close()
    text = stream.getvalue()
    assert text.count("lines were") == 1
    assert text.index("lines were") < text.index("two [/gloo/pair.cc:547] :boom:") < text.index("three")
    assert "1/2" in text[text.index("three") :]


def test_lines_go_to_a_file_in_the_order_in_which_they_were_printed(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        printer = Printer(stream)
        print("of a library", file=stream)
        printer.line("ours: é")
        print("of a library", file=stream)
    assert (tmp_path / "log").read_text() == "of a library\nours: é\nof a library\n"


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as stream:
        Printer(stream).line("job é")
    assert (tmp_path / "log").read_text() == "job \\xe9\n"


class HalfRaw(io.RawIOBase):
    """Takes 3 bytes, then nothing until there is room."""

    def __init__(self) -> None:
        self.data, self.room = b"", 3

    def writable(self) -> bool:
        """For the buffer above."""
        return True

    def write(self, data: bytes) -> int | None:  # type: ignore[override]
        """What a pipe that nobody waits for does: None where it is full."""
        taken = bytes(data[: self.room])
        self.data += taken
        self.room -= len(taken)
        return len(taken) or None


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "PYTHONUNBUFFERED"])
def test_a_line_that_was_cut_off_is_ended_before_the_next_one(buffered: bool) -> None:
    raw = HalfRaw()
    stream: Any = io.BufferedWriter(raw) if buffered else raw
    printer = Printer(io.TextIOWrapper(stream, write_through=not buffered))
    printer.line("first")
    printer.line("second")
    raw.room = 1000
    printer.line("third")
    assert raw.data.decode().splitlines() == ["fir", LOST.format("2 lines were"), "third"]


def test_a_process_without_stdout_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    log = make_progress(is_first=True, log_interval=1)
    assert isinstance(log, Lines)
    tell_everything(log)
