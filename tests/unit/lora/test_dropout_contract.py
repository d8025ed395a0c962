"""What users rely on beside the masks' statistics (tests/unit/kernels/test_dropout.py)."""

import pytest
import torch

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.kernels.dropout import keep_mask, row_keys
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.families import check_tensor_parallel
from tests import tiny


def test_masks_never_change_between_versions():
    """A run that was saved by one version is resumed by the next."""
    ones = torch.ones(2, dtype=torch.int64)
    keys = row_keys(((1 << 62) + 5) * ones, 3 * ones, 2 * ones, torch.arange(2))
    assert keys.tolist() == [[-2091429631, 654130788], [1536367532, -687941994]]
    assert keep_mask(keys, 0xDEADBEEF, 12, 0.5).int().tolist() == [
        [1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
    ]


def test_tensor_parallelism_that_would_cut_a_word_in_two_is_refused(tmp_path):
    spec = read_model_spec(tiny.write_base(tmp_path, intermediate_size=36, num_key_value_heads=4))
    check_tensor_parallel(spec, 2)
    with pytest.raises(UserError, match="an even number"):
        check_tensor_parallel(spec, 4)
