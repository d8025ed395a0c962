"""What is wrong with a timeline is one line."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.training.calibrate import calibrate, read_measurements


def spans() -> list[dict[str, Any]]:
    """A timeline of 10 forwards and 10 backwards after the warm-up."""
    return [
        {
            "ph": "X",
            "cat": kind,
            "dur": 100.0 + position * factor,
            "args": {
                "position": position,
                "tokens": 64 * position,
                "squares": 64 * position * (5 + position % 3),
                "layers": 1 + position % 2,
                "output": position % 2 == 0,
            },
        }
        for kind, factor in (("forward", 20.0), ("backward", 40.0))
        for position in range(3, 13)
    ]


def write(folder: Path, events: object) -> None:
    (folder / "trace.json").write_text(json.dumps({"traceEvents": events}))


def test_a_good_timeline_gives_rates(tmp_path: Path) -> None:
    write(tmp_path, spans())
    assert len(read_measurements(tmp_path)) == 20
    cost, error = calibrate(tmp_path)
    assert cost.backward.layer_token + cost.backward.layer_square > 0
    assert error < 0.3


@pytest.mark.parametrize("value", [None, "a", -1, 0.5, True, [], 10**400], ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("name", ["tokens", "squares", "layers"])
def test_a_figure_that_no_run_writes_is_an_error(tmp_path: Path, name: str, value: object) -> None:
    events = deepcopy(spans())
    events[7]["args"][name] = value
    write(tmp_path, events)
    with pytest.raises(UserError, match=rf"--calibrate: .*trace.json \(ValueError: {name} is "):
        calibrate(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("args", None), ("args", "text"), ("args", {}), ("dur", "1"), ("dur", None), ("dur", 10**400), ("dur", 1e-300)],
    ids=lambda value: repr(value)[:8],
)
def test_a_span_that_no_run_writes_is_an_error(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path, [*spans(), spans()[0] | {key: value}])
    with pytest.raises(UserError, match=r"--calibrate: .*trace.json \(.*rates are measured on the timeline"):
        calibrate(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("output", None), ("output", "yes"), ("position", None), ("position", "")])
def test_a_place_that_no_run_writes_is_an_error(tmp_path: Path, name: str, value: object) -> None:
    events = spans()
    events[0]["args"][name] = value
    write(tmp_path, events)
    with pytest.raises(UserError, match="--calibrate: "):
        calibrate(tmp_path)


def test_a_timeline_that_is_nested_without_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="--calibrate: "):
        calibrate(tmp_path)


def test_a_timeline_without_backwards_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [span | {"cat": "forward"} for span in spans()])
    with pytest.raises(UserError, match="0 measurements of a direction can't fit 5 rates"):
        calibrate(tmp_path)
