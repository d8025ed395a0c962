"""What Megatron's log needs to know of a window, watched on its way to whoever shows it."""

from ...training.progress import Progress
from ...types import Schedule, StepReport


class WatchedProgress:
    """Hands everything on, and keeps the last window's size.

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

    def step(self, report: StepReport, *, name: str, total: int, tokens: int) -> None:
        """A job's optimizer step was applied."""
        self._shown.step(report, name=name, total=total, tokens=tokens)

    def window_done(self, *, bubble_share: float, seconds: float) -> None:
        """A window ended."""
        self._shown.window_done(bubble_share=bubble_share, seconds=seconds)

    def note(self, text: str) -> None:
        """Something worth a line."""
        self._shown.note(text)

    def close(self) -> None:
        """The run ended."""
        self._shown.close()
