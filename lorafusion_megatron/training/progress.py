"""What a run prints: a live table in a terminal, plain lines elsewhere, JSON lines for programs that collect logs.

None of them raises where stdout can't be written: the run goes on, and lines are lost until it can (`Printer`).
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Literal, Protocol, cast

from ..types import Schedule, StepReport
from .output import strict_json
from .printing import Printer, say_lost


class Progress(Protocol):
    """Told of everything that happens, on rank 0."""

    def window(self, schedule: Schedule, names: list[str]) -> None:
        """A window begins."""

    def step(self, report: StepReport, *, name: str, total: int, tokens: int) -> None:
        """A job's optimizer step was applied."""

    def window_done(self, *, bubble_share: float, seconds: float) -> None:
        """A window ended."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def close(self) -> None:
        """The run ended."""


class Silent:
    """The other ranks."""

    def window(self, schedule: Schedule, names: list[str]) -> None: ...
    def step(self, report: StepReport, *, name: str, total: int, tokens: int) -> None: ...
    def window_done(self, *, bubble_share: float, seconds: float) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


def count_mixes(schedule: Schedule, names: list[str]) -> Counter[str]:
    """Jobs that share a microbatch, joined by ``+`` -> how many such microbatches there are."""
    mixes: Counter[str] = Counter()
    for replica in schedule.replicas:
        for microbatch in replica:
            jobs = dict.fromkeys(names[sample.job] for sample in microbatch.samples)
            mixes["+".join(jobs) or "no-op"] += 1
    return mixes


def describe_mix(schedule: Schedule, names: list[str]) -> str:
    """Which jobs share microbatches, most frequent first: ``a+b 12, a 3, no-op 1``."""
    return ", ".join(f"{mix} {count}" for mix, count in count_mixes(schedule, names).most_common(8))


class Lines:
    """A line per optimizer step, for log files."""

    def __init__(self, log_interval: int = 1) -> None:
        self.log_interval = log_interval
        self._tokens = 0
        self._out = Printer()

    def window(self, schedule: Schedule, names: list[str]) -> None:
        """A window begins."""
        self.note(f"window of {schedule.num_microbatches} microbatches; jobs together: {describe_mix(schedule, names)}")

    def step(self, report: StepReport, *, name: str, total: int, tokens: int) -> None:
        """A job's optimizer step was applied."""
        self._tokens += tokens
        if report.step % self.log_interval and report.step != total and not report.skipped:
            return
        skipped = "  SKIPPED: the gradient is not finite" if report.skipped else ""
        self.note(
            f"{name} step {report.step}/{total}  loss {report.loss:.4f}  lr {report.lr:.3g}  "
            f"grad norm {report.grad_norm:.3g}{skipped}"
        )

    def window_done(self, *, bubble_share: float, seconds: float) -> None:
        """A window ended."""
        rate, self._tokens = self._tokens / seconds, 0
        self.note(f"window done in {seconds:.1f} s: {rate:,.0f} tokens/s, bubble share {bubble_share:.1%}")

    def note(self, text: str) -> None:
        """Print a line."""
        self._out.line(text)

    def close(self) -> None:
        """Nothing is open."""


class JsonLines:
    """One JSON object a line on stdout, with ``time`` (seconds since 1970) and ``event``, for log collectors.

    Note: a number that is not finite is null, since JSON has no other word for it.
    """

    def __init__(self, log_interval: int = 1) -> None:
        self.log_interval = log_interval
        self._tokens = 0
        self._out = Printer(say_lost=lambda count: self._line("note", text=say_lost(count)))

    def window(self, schedule: Schedule, names: list[str]) -> None:
        """A window begins."""
        mixes = dict(count_mixes(schedule, names).most_common())
        self._print("window", microbatches=schedule.num_microbatches, mixes=mixes)

    def step(self, report: StepReport, *, name: str, total: int, tokens: int) -> None:
        """A job's optimizer step was applied."""
        self._tokens += tokens
        if report.step % self.log_interval and report.step != total and not report.skipped:
            return
        self._print(
            "step",
            job=name,
            step=report.step,
            total=total,
            loss=report.loss,
            lr=report.lr,
            grad_norm=report.grad_norm,
            skipped=report.skipped,
            tokens=tokens,
        )

    def window_done(self, *, bubble_share: float, seconds: float) -> None:
        """A window ended."""
        rate, self._tokens = self._tokens / seconds, 0
        self._print("window_done", seconds=seconds, tokens_per_second=rate, bubble_share=bubble_share)

    def note(self, text: str) -> None:
        """Print a line of text."""
        self._print("note", text=text)

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, event: str, **values: object) -> None:
        self._out.line(self._line(event, **values))

    @staticmethod
    def _line(event: str, **values: object) -> str:
        return strict_json({"time": time.time(), "event": event, **values})


@dataclass(kw_only=True)
class _Row:
    total: int
    report: StepReport
    tokens: int = 0
    since: float = field(default_factory=time.perf_counter)

    @property
    def rate(self) -> float:
        return self.tokens / max(1e-9, time.perf_counter() - self.since)


class LiveTable:
    """A table redrawn in place: per job step, loss, lr, gradient norm, tokens/s; below it the mix and bubbles."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._rows: dict[str, _Row] = {}
        self._mix = ""
        self._bubbles = ""
        self._started = time.perf_counter()
        # The stream as it is now: a live table puts itself in the place of sys.stdout.
        self._out = Printer(sys.stdout)
        console = Console(file=cast(IO[str], self._out))
        self._live = Live(self._table(), console=console, refresh_per_second=4)
        self._live.start()

    def window(self, schedule: Schedule, names: list[str]) -> None:
        """A window begins."""
        self._mix = describe_mix(schedule, names)
        # Those that train stand first: the screen may not hold all jobs that a long run has had.
        now = {names[end.job] for end in schedule.step_ends}
        self._rows = dict(sorted(self._rows.items(), key=lambda row: row[0] not in now))
        self._live.update(self._table())

    def step(self, report: StepReport, *, name: str, total: int, tokens: int) -> None:
        """A job's optimizer step was applied."""
        row = self._rows.setdefault(name, _Row(total=total, report=report, since=self._started))
        row.report = report
        row.tokens += tokens
        if report.skipped:
            self.note(f"{name} step {report.step}: skipped, the gradient is not finite")
        self._live.update(self._table())

    def window_done(self, *, bubble_share: float, seconds: float) -> None:
        """A window ended."""
        self._bubbles = f"bubble share {bubble_share:.1%} over the last window of {seconds:.1f} s"
        self._live.update(self._table())

    def note(self, text: str) -> None:
        """Print a line above the table."""
        self._out.line(text, self._print)

    def _print(self, text: str) -> None:
        # As it is: gloo's messages have paths in brackets, which rich takes for markup and refuses.
        self._live.console.print(text, markup=False, emoji=False, highlight=False)

    def close(self) -> None:
        """Leave the last table on the screen."""
        self._live.update(self._table())
        self._live.stop()

    def _table(self) -> object:
        from rich.table import Table

        caption = "\n".join(text for text in (f"microbatches: {self._mix}" if self._mix else "", self._bubbles) if text)
        table = Table(caption=caption or None, caption_justify="left")
        for column in ("job", "step", "loss", "lr", "grad norm", "tokens/s"):
            table.add_column(column, justify="left" if column == "job" else "right")
        for name, row in self._rows.items():
            report = row.report
            table.add_row(
                name,
                f"{report.step}/{row.total}",
                f"{report.loss:.4f}",
                f"{report.lr:.2e}",
                f"{report.grad_norm:.3f}",
                f"{row.rate:,.0f}",
            )
        return table


def make_progress(
    *, is_first: bool, log_interval: int, log_format: Literal["auto", "lines", "json"] = "auto"
) -> Progress:
    """What rank 0 prints to; the other ranks print nothing.

    Args:
        is_first: whether this is rank 0.
        log_interval: optimizer steps of a job between two lines.
        log_format: auto is the live table in a terminal and lines elsewhere.
    """
    if not is_first:
        return Silent()
    if log_format == "json":
        return JsonLines(log_interval)
    return LiveTable() if log_format == "auto" and Printer().isatty() else Lines(log_interval)
