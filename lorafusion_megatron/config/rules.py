"""Checks of single values, shared by all sections of the run file; a failed one raises a `UserError`."""

import math
import reprlib

from lorafusion_megatron.errors import UserError

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 2


def show(value: object) -> str:
    """A value as it stands in a message: at most a line, whatever was given (YAML aliases can nest without end)."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "a number beyond 64 bits"
    return _short.repr(value)


def printable(path: str) -> str:
    """A path of the command line as every terminal takes it: bytes that are no text are escaped."""
    return path.encode(errors="backslashreplace").decode()


def require(ok: bool, *, key: str, given: str, rule: str, remedy: str) -> None:
    """Raise the `UserError` of these parts unless ``ok``."""
    if not ok:
        raise UserError(given, rule=rule, remedy=remedy, key=key)


def in_range(
    key: str,
    value: float | None,
    *,
    low: float,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
    remedy: str = "",
) -> None:
    """Check ``low <= value <= high``; None passes.

    Args:
        key: the YAML key, relative to its section.
        low, high: the borders.
        above, below: whether the value must be truly above ``low`` / below ``high``.
        remedy: what to do instead of "give such a number".
    """
    if value is None:
        return
    ok_low = value > low if above else value >= low
    ok_high = value < high if below else value <= high
    rule = f"must be {'above' if above else 'at least'} {low}"
    if high != math.inf:
        rule += f" and {'below' if below else 'at most'} {high}"
    require(ok_low and ok_high, key=key, given=f"got {show(value)}", rule=rule, remedy=remedy or "give such a number")
