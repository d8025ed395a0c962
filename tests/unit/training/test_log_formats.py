"""What rank 0 prints, line by line."""

import json
import math
import time

import pytest

from lorafusion_megatron.training.progress import JsonLines, Lines, LiveTable, Silent, make_progress
from lorafusion_megatron.types import Microbatch, Sample, Schedule, StepEnd, StepReport


def sample(job: int, position: int) -> Sample:
    """A sample of three tokens in step 1."""
    return Sample(job=job, step=1, position=position, row=position, tokens=3, batch_label_tokens=6)


SCHEDULE = Schedule(
    replicas=(
        (
            Microbatch(samples=(sample(0, 0), sample(1, 0))),
            Microbatch(samples=(sample(0, 1), sample(1, 1))),
            Microbatch(),
        ),
    ),
    step_ends=(StepEnd(job=0, step=1, position=1), StepEnd(job=1, step=1, position=1)),
    distance=1,
    token_capacity=16,
    padding_multiple=1,
)


def report(step: int, *, loss: float = 0.5, skipped: bool = False) -> StepReport:
    """A step of job 0."""
    return StepReport(job=0, step=step, loss=loss, grad_norm=2.0, lr=0.25, skipped=skipped)


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    """The printed objects, strictly read, without their times."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines()]
    assert all(abs(line.pop("time") - time.time()) < 60 for line in lines)
    return lines


def test_json_lines_tell_windows_steps_rates_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonLines()
    log.window(SCHEDULE, ["a", "b"])
    log.step(report(1), name="a", total=2, tokens=60)
    log.step(report(2, loss=math.nan, skipped=True), name="a", total=2, tokens=40)
    log.window_done(bubble_share=0.125, seconds=2.0)
    log.note('two\nlines and "quotes"')
    step = {"event": "step", "job": "a", "total": 2, "lr": 0.25, "grad_norm": 2.0}
    assert printed(capsys) == [
        {"event": "window", "microbatches": 3, "mixes": {"a+b": 2, "no-op": 1}},
        {**step, "step": 1, "loss": 0.5, "skipped": False, "tokens": 60},
        {**step, "step": 2, "loss": None, "skipped": True, "tokens": 40},
        {"event": "window_done", "seconds": 2.0, "tokens_per_second": 50.0, "bubble_share": 0.125},
        {"event": "note", "text": 'two\nlines and "quotes"'},
    ]


def test_json_lines_between_two_intervals_are_left_out_but_for_the_last_and_skipped_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = JsonLines(log_interval=4)
    for step in range(1, 8):
        log.step(report(step, skipped=step == 2), name="a", total=7, tokens=10)
    assert [line["step"] for line in printed(capsys)] == [2, 4, 7]


def test_the_format_is_the_one_that_was_asked_for() -> None:
    assert isinstance(make_progress(is_first=True, log_interval=1, log_format="json"), JsonLines)
    assert isinstance(make_progress(is_first=True, log_interval=1), Lines)
    assert isinstance(make_progress(is_first=False, log_interval=1, log_format="json"), Silent)


def test_the_live_table_shows_the_jobs_that_train_before_those_that_have_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = LiveTable()
    for name in ("left", "a", "b"):
        table.step(report(1), name=name, total=2, tokens=3)
    table.window(SCHEDULE, ["a", "b"])
    table.close()
    shown = capsys.readouterr().out
    assert [shown.rindex(f" {name} ") for name in ("a", "b", "left")] == sorted(
        shown.rindex(f" {name} ") for name in ("a", "b", "left")
    )
