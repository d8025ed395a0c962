"""Measured rates for the planner, from the timeline of a run that was made."""

import json
import reprlib
import statistics
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..scheduler.cost import CostModel, Load, Measurement, StageLoad, fit_cost_model

WARMUP = 3
"""Microbatches at the start of a stage's timeline that are left out: first calls compile and allocate."""


def read_measurements(folder: Path, *, key: str = "--calibrate") -> list[Measurement]:
    """The forwards and backwards of a run's ``trace.json``.

    Raises:
        UserError: the folder holds no timeline of this version, or too little of one.
    """
    try:
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        spans = [event for event in events if event["ph"] == "X"]
        rows = [_measurement(span) for span in spans if span["args"]["position"] >= WARMUP and span["dur"] > 0]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / 'trace.json'} ({type(error).__name__}: {error})",
            rule="rates are measured on the timeline of a run that ended",
            remedy="train a short run first and give its checkpoint.save folder",
            key=key,
        ) from None
    if len(rows) < 20:
        raise UserError(
            f"{folder} has {len(rows)} timed forwards and backwards",
            rule="a fit needs at least 20",
            remedy="train more steps, on samples of several lengths",
            key=key,
        )
    return rows


def _measurement(span: dict[str, Any]) -> Measurement:
    """One forward or backward of the timeline.

    Raises:
        ValueError: a figure is no number, or none that a run writes.
    """
    args, microseconds = span["args"], span["dur"]
    for name in ("layers", "tokens", "squares"):
        if type(args[name]) is not int or not 0 <= args[name] < 2**63:
            raise ValueError(f"{name} is {reprlib.repr(args[name])}")
    if type(args["output"]) is not bool:
        raise ValueError(f"output is {reprlib.repr(args['output'])}")
    if type(microseconds) not in (int, float) or not 1e-6 <= microseconds <= 1e12:
        raise ValueError(f"dur is {reprlib.repr(microseconds)}")
    return Measurement(
        backward=span["cat"] == "backward",
        layers=args["layers"],
        output=args["output"],
        load=Load(tokens=args["tokens"], squares=args["squares"]),
        seconds=microseconds / 1e6,
    )


def calibrate(folder: Path) -> tuple[CostModel, float]:
    """Fit the rates to a run.

    Args:
        folder: the run's folder.

    Returns:
        The cost model, and the median relative error of its predictions on the same forwards and backwards.

    Raises:
        UserError: as `read_measurements`; a direction has too few times, or they do not depend on the tokens.
    """
    rows = read_measurements(folder)
    try:
        cost = fit_cost_model(rows)
        cost.check()
    except ValueError as error:
        raise UserError(
            f"the rates that fit {folder} are of no use ({error})",
            rule="rates are fitted to times that grow with the tokens",
            remedy="train more steps on a GPU that does nothing else, on samples of several lengths",
            key="--calibrate",
        ) from None
    errors = []
    for row in rows:
        stage = StageLoad(layers=row.layers, output=row.output)
        errors.append(abs(cost.seconds(row.load, stage, backward=row.backward) - row.seconds) / row.seconds)
    return cost, statistics.median(errors)


def save_rates(cost: CostModel, target: Path) -> None:
    """Keep the rates.

    Raises:
        UserError: the file can't be written.
    """
    try:
        cost.save(target)
    except OSError as error:
        raise UserError(
            f"{target} can't be written ({error.strerror})",
            rule="the rates are kept beside the run",
            remedy="mend that, or copy the run's trace.json into a folder of your own",
            key="--calibrate",
        ) from None
