"""Signals that ask a run to save and end: SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT."""

import os
import signal
import time
from types import FrameType
from typing import Protocol

EXIT_STOPPED = 75
"""Exit status of a run that a signal ended after its state was saved (EX_TEMPFAIL of sysexits.h: run it again)."""
SAME_SIGNAL_SECONDS = 2.0
"""A launcher often passes a signal on that the process group got already; within this time it is the same one."""


class Stop(Protocol):
    """Whoever knows whether this rank is to stop."""

    def wished(self) -> bool:
        """Whether to stop."""


class StopRequest:
    """Whether a signal asked this rank to stop; a second one ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at = 0.0
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def wished(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None and now - self._at > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._at = signal.Signals(number), now
