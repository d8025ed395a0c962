"""Adapters on their way to rank 0."""

import pytest

from tests.distributed.gathering import bring
from tests.launch import Ranks


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", [37, 1 << 23])
def test_whole_factors_arrive_whatever_the_pieces(piece, tmp_path):
    Ranks(bring, [piece], world=4, folder=tmp_path).wait(40).check()
