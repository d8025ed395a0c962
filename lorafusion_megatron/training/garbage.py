"""Python's cyclic garbage collector, kept off the hot path.

Imports and compilers leave about a million objects behind. A full collection visits them all, 0.3 seconds and more in
which the GPU runs dry, and the objects that training makes set one off every few seconds. Frozen, they are visited no
more.
"""

import gc


def settle() -> None:
    """Collect everything, what was frozen earlier included, and let later collections look at new objects alone.

    Note: takes as long as one full collection. Call it where the pipeline is empty and much was made or let go.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class Collector:
    """Settles before a run's windows where it is worth it.

    Args:
        active: whether at all; where nothing runs ahead of the host, collections cost no more than elsewhere.
    """

    FIRST = 2
    """Windows of a process, resumed or not, that come after many new objects: imports and the model, then what the
    first window compiled."""

    def __init__(self, *, active: bool) -> None:
        self._active = active
        self._windows = 0

    def before_window(self, *, released: bool) -> None:
        """Settle before the first windows, and where jobs have left (``released``)."""
        if self._active and (released or self._windows < self.FIRST):
            settle()
        self._windows += 1

    def close(self) -> None:
        """The run is over: collections look at everything again, or a process that goes on would keep its cycles."""
        if self._active:
            gc.unfreeze()
