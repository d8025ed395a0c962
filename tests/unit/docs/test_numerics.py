"""docs/numerics.md names tests that exist, at least one for each of the 31 reported faults."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/numerics.md").read_text()


def test_every_named_test_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 35
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (path := ROOT / "tests" / file).is_file() or f"def {name}(" not in path.read_text()
    ]
    assert missing == []


def test_every_reported_fault_has_a_test():
    rows = {int(number): line for number, line in re.findall(r"^\| (\d+) \|(.*)$", PAGE, re.MULTILINE)}
    assert sorted(rows) == list(range(1, 32))
    assert [number for number, line in rows.items() if "::test_" not in line] == []
