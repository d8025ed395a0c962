"""The dropout counter: masks depend on what a token is, never on where it lies."""

import pytest
import torch

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.kernels.dropout import keep_mask, keep_scale, row_keys, threshold
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.families import check_tensor_parallel
from tests import tiny


def _keys(seed: int = 11, step: int = 3, sample: int = 2, tokens: int = 400) -> torch.Tensor:
    ones = torch.ones(tokens, dtype=torch.int64)
    return row_keys(seed * ones, step * ones, sample * ones, torch.arange(tokens))


def test_masks_never_change_between_versions():
    """A run that was saved by one version is resumed by the next."""
    keys = _keys(seed=(1 << 62) + 5, tokens=2)
    assert keys.tolist() == [[-2091429631, 654130788], [1536367532, -687941994]]
    assert keep_mask(keys, 0xDEADBEEF, 12, 0.5).int().tolist() == [
        [0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 0],
    ]


def test_a_token_has_its_mask_in_any_packing():
    keys = _keys()
    whole = keep_mask(keys, 5, 64, 0.1)
    order = torch.randperm(len(keys))
    assert torch.equal(keep_mask(keys[order], 5, 64, 0.1), whole[order])


@pytest.mark.parametrize("shards", [2, 4])
def test_tensor_parallel_ranks_draw_their_columns_of_the_whole_mask(shards):
    keys = _keys()
    whole = keep_mask(keys, 5, 64, 0.3)
    width = 64 // shards
    parts = [keep_mask(keys, 5, width, 0.3, feature_offset=rank * width) for rank in range(shards)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_tensor_parallelism_that_would_cut_a_word_in_two_is_refused(tmp_path):
    spec = read_model_spec(tiny.write_base(tmp_path, intermediate_size=36, num_key_value_heads=4))
    check_tensor_parallel(spec, 2)
    with pytest.raises(UserError, match="an even number"):
        check_tensor_parallel(spec, 4)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_values_and_their_expectation(p):
    keep = keep_mask(_keys(tokens=2000), 17, 256, p)
    share = keep.double().mean().item()
    sigma = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(share - (1 - threshold(p) / 32768)) < 5 * sigma + 1e-12
    assert share * keep_scale(p) == pytest.approx(1.0, abs=6 * sigma / max(1e-9, 1 - p) + 1e-12)
    assert abs(threshold(p) / 32768 - p) <= 0.5 / 32768


@pytest.mark.parametrize("change", [{"seed": 12}, {"step": 4}, {"sample": 3}])
def test_another_job_step_or_sample_has_an_independent_mask(change):
    one, other = keep_mask(_keys(), 5, 256, 0.5), keep_mask(_keys(**change), 5, 256, 0.5)
    agree = (one == other).double().mean().item()
    assert abs(agree - 0.5) < 5 * 0.5 / one.numel() ** 0.5


def test_another_module_position_or_feature_has_an_independent_mask():
    keys = _keys()
    mask = keep_mask(keys, 5, 256, 0.5)
    for other in (keep_mask(keys, 6, 256, 0.5), mask.roll(1, 0), mask.roll(1, 1), mask.roll(2, 1)):
        agree = (mask == other).double().mean().item()
        assert abs(agree - 0.5) < 5 * 0.5 / mask.numel() ** 0.5
