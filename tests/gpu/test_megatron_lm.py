"""A pretraining script on GPUs, through Megatron's own `pretrain(...)`: stock layers and NCCL."""

import pytest
import torch

from tests.distributed.megatron_lm import SCRIPT, pretrain
from tests.gpu import ranks
from tests.oracle.case import TOLERANCE, OracleCase

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(1200),  # launch's own time-outs tell more
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def _train(case: OracleCase, out, dtype: str, words: str, world: int = 1) -> float:
    overrides = ("runtime.device=cuda", f"base_model.dtype={dtype}")
    words += " --bf16" if dtype == "bfloat16" else ""
    # Megatron asks for one hardware queue under tensor parallel.
    one_queue = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    finished = pretrain(
        SCRIPT, case.run_file, out, *words.split(), world=world, overrides=overrides, environment=one_queue
    ).check()
    assert "job/job0/loss" in finished.outputs[-1]
    return case.error(out)


def test_local_layers_in_fp32_equal_peft(case, tmp_path, measured):
    words = "--transformer-impl local"
    assert measured(_train(case, tmp_path / "out", "float32", words)) <= TOLERANCE


def test_stock_transformer_engine_layers_in_bf16_are_as_near_as_peft_is(case, bf16_error, tmp_path, measured):
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    assert measured(_train(case, tmp_path / "out", "bfloat16", "")) <= ranks.BF16_MARGIN * bf16_error


@two_gpus
@pytest.mark.parametrize(
    "words",
    [
        "--pipeline-model-parallel-size 2",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ],
)
def test_two_gpus_in_fp32_equal_peft(case, tmp_path, measured, words):
    assert measured(_train(case, tmp_path / "out", "float32", f"--transformer-impl local {words}", 2)) <= TOLERANCE
