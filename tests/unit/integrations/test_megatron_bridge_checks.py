"""Models that were built another way than the run file says are refused."""

from types import SimpleNamespace

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.integrations.megatron_bridge import _check_sequence_parallel
from lorafusion_megatron.types import Topology


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_sequence_parallel_must_be_that_of_the_models(ours, theirs):
    topology = Topology(tensor_parallel=2, sequence_parallel=ours)
    if ours == theirs:
        _check_sequence_parallel(SimpleNamespace(sequence_parallel=theirs), topology)
        return
    with pytest.raises(UserError, match=f"model.sequence_parallel: {ours} in the run file, {theirs} in the models'"):
        _check_sequence_parallel(SimpleNamespace(sequence_parallel=theirs), topology)


def test_one_rank_has_nothing_to_divide():
    _check_sequence_parallel(SimpleNamespace(sequence_parallel=True), Topology())
