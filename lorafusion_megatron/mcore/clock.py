"""Marks in time on the stream of work: the host's clock on the CPU, CUDA events on a GPU."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

Mark = Any
"""What `Clock.mark` returns; only the clock that made it can read it."""


class Clock(Protocol):
    """Takes marks cheaply while work is enqueued, and reads them later."""

    def mark(self) -> Mark:
        """A mark behind all work enqueued so far."""

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """When the marks were passed, in seconds of `time.perf_counter`; waits for the last."""


class HostClock:
    """Work on the CPU is done when the call returns: a mark is the time itself."""

    def mark(self) -> Mark:
        """The time now."""
        return time.perf_counter()

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """The marks."""
        return [float(mark) for mark in marks]


class DeviceClock:
    """CUDA events on the current stream, tied to the host's clock by one synchronisation when it is made.

    Note: an event costs about 2 us of the host's time and none of the device's; the host's clock would show when
    kernels were enqueued, which is up to a whole microbatch before they run.
    """

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._origin = time.perf_counter()
        self._first = self.mark()

    def mark(self) -> Mark:
        """An event behind the stream's work."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """Times of the events, after one synchronisation for all."""
        torch.cuda.current_stream().synchronize()
        return [self._origin + self._first.elapsed_time(mark) / 1e3 for mark in marks]


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return DeviceClock() if device.type == "cuda" else HostClock()
