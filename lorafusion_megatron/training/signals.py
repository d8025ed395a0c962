"""Signals that ask a run to save and end: SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT."""

import os
import signal
import socket
import threading
import time
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
    """Whether a signal asked this rank to stop; a second one ends the process at once.

    Note: Python runs signal handlers on the main thread between two bytecodes, so never while that thread waits
    inside a collective, perhaps for a rank that is lost. The interpreter's own handler writes the signal's number
    to a socket at once, and a thread that reads it acts.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at = 0.0
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def wished(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    def restore(self) -> None:
        """Put everything back that was there before."""
        signal.set_wakeup_fd(self._before_fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        while data := self._reader.recv(64):
            for number in data:
                if number in self.SIGNALS:
                    self._receive(signal.Signals(number))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._at = number, now
        elif now - self._at > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
