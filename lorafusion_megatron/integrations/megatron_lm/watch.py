"""What Megatron's log needs to know of a window, watched on its way to whoever shows it."""

from typing import Any

from ...training.progress import Progress
from ...types import Schedule


class WatchedProgress:
    """A `Progress` that hands everything on and keeps the last window's size.

    Args:
        shown: where it goes.
    """

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self.num_microbatches = 0
        """Of one replica."""
        self.tokens = self.squares = 0.0
        """Tokens and squared lengths of all samples, over all replicas."""

    def window(self, schedule: Schedule, names: list[str]) -> None:
        """A window begins."""
        lengths = [s.tokens for replica in schedule.replicas for microbatch in replica for s in microbatch.samples]
        self.num_microbatches = schedule.num_microbatches
        self.tokens, self.squares = float(sum(lengths)), float(sum(length**2 for length in lengths))
        self._shown.window(schedule, names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)
