"""Cases of the oracle: made once, trained once by Transformers + PEFT, and compared with what the package exported."""

import argparse
import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import Ranks

TOLERANCE = 1e-3
"""The oracle's own."""


@dataclass(frozen=True, kw_only=True)
class OracleCase:
    """A run file with the adapters and losses that each of its jobs has when the oracle trains it alone."""

    folder: Path

    @property
    def run_file(self) -> Path:
        """The run file: three jobs in fp32 without dropout, of ranks 4, 8 and 16, that end at different steps."""
        return self.folder / "run.yaml"

    @property
    def answers(self) -> Path:
        """What the oracle wrote."""
        return self.folder / "oracle"

    def error(self, product: Path) -> float:
        """Largest update error or loss error of all tensors and steps; raises where tensors or steps differ."""
        from tests.oracle import peft_oracle

        text = io.StringIO()
        arguments = argparse.Namespace(run=self.run_file, oracle=self.answers, product=product, tol=TOLERANCE)
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
            peft_oracle.compare(arguments)
        assert isinstance(end.value.code, int), end.value.code
        match = re.search(r"^worst (\S+), tolerance", text.getvalue(), re.MULTILINE)
        assert match is not None, text.getvalue()
        return float(match.group(1))


def make_case(folder: Path, *, arch: str, tied: bool = False, jobs: int = 3, seed: int = 0) -> OracleCase:
    """Write a case and let the oracle train it, in a process of its own."""
    Ranks(_make, (str(folder), arch, tied, jobs, seed), world=1, folder=folder / "logs").wait(180.0).check()
    return OracleCase(folder=folder)


def _make(folder: str, arch: str, tied: bool, jobs: int, seed: int) -> None:
    from tests.oracle import peft_oracle

    peft_oracle.make(argparse.Namespace(case=folder, arch=arch, tied=tied, jobs=jobs, seed=seed, pp=1))
    peft_oracle.train(argparse.Namespace(run=f"{folder}/run.yaml", oracle=f"{folder}/oracle"))
