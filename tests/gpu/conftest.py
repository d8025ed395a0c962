"""The oracle's case for tests that train on GPUs, made once a test module."""

import pytest

from tests import launch
from tests.gpu import ranks
from tests.oracle.case import OracleCase, make_case


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> OracleCase:
    """The llama case, trained by the oracle."""
    return make_case(tmp_path_factory.mktemp("case"), arch="llama")


@pytest.fixture(scope="module")
def bf16_error(case) -> float:
    """How far PEFT's own bf16 run is from its fp32 run."""
    out = case.folder / "bf16"
    launch.Ranks(ranks.bf16_oracle, (str(case.folder), str(out)), world=1, folder=case.folder / "logs16").wait().check()
    return case.error(out)
