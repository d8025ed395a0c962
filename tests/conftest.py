"""Settings of every test process: one thread each, since ranks of a test share two cores."""

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a GPU the kernels run under Triton's interpreter, which must be chosen before any test imports them.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

MEASURED: pytest.StashKey[dict[str, list[float]]] = pytest.StashKey()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[float], float]:
    """Notes a figure that a test measured and returns it; the worst of each test function is printed at the end."""
    stash = request.config.stash
    figures = stash.setdefault(MEASURED, defaultdict(list))
    name = f"{request.node.path.name}::{request.node.originalname}"

    def note(value: float) -> float:
        figures[name].append(value)
        return value

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the worst figure of each test function that measured one."""
    for name, values in config.stash.get(MEASURED, {}).items():
        terminalreporter.write_line(f"measured, worst of {len(values)}: {max(values):.2e}  {name}")
