"""The MLP as one function inside Megatron, also where its linears are split over ranks."""

import json
from pathlib import Path

import pytest

from tests import launch
from tests.distributed import swiglu


@pytest.mark.parametrize(("world", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_it_gives_what_linear_activation_linear_gives(tmp_path, measured, world, sequence_parallel):
    out = str(tmp_path / "worst")
    launch.Ranks(swiglu.compare, (out, world, sequence_parallel), world=world, folder=tmp_path).wait().check()
    for rank in range(world):
        assert measured(json.loads(Path(f"{out}.{rank}").read_text())) <= 1e-5
