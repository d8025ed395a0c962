"""Marks in time on the stream of work: the host's clock on the CPU, CUDA events on a GPU."""

import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .parallel import Groups

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


def seconds_ahead(groups: Groups, *, rounds: int = 5) -> float:
    """How far `time.perf_counter` of this host is ahead of rank 0's; every rank calls it.

    It counts from each host's start. On rank 0's own host this is 0; on others the median over rounds in which all
    ranks leave a barrier at once, right within a fraction of a millisecond or as slow as their network.
    """
    ahead, boot, first_boot = [], _boot(), ""
    for _ in range(rounds if groups.size > 1 else 0):
        dist.barrier(group=groups.objects)
        now = time.perf_counter()
        first_boot, first = groups.broadcast((boot, now))
        ahead.append(now - first)
    return statistics.median(ahead) if ahead and boot != first_boot else 0.0


def _boot() -> str:
    """What tells this start of this machine from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()
