"""Models of the real Megatron-Bridge, through the example script: what AutoBridge builds trains what PEFT trains."""

import importlib.util

import pytest
import torch

from tests import launch
from tests.gpu import ranks
from tests.oracle.case import TOLERANCE, OracleCase, make_case

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("megatron.bridge") is None, reason="needs Megatron-Bridge"),
    pytest.mark.timeout(1200),  # launch's own time-outs tell more
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def _train(case: OracleCase, out, dtype: str, *words: str, world: int = 1) -> float:
    words = (str(case.run_file), f"checkpoint.save={out}", f"base_model.dtype={dtype}", "runtime.device=cuda", *words)
    logs = out.with_name("logs")
    launch.Ranks(ranks.bridge_lora, (list(words),), world=world, folder=logs).wait().check()
    return case.error(out)


@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", False)])
def test_each_family_in_fp32_gives_what_peft_gives(tmp_path, measured, arch, tied):
    case = make_case(tmp_path / "case", arch=arch, tied=tied)
    assert measured(_train(case, tmp_path / "out", "float32")) <= TOLERANCE


def test_one_gpu_in_bf16_is_as_near_to_fp32_as_peft_in_bf16(case, bf16_error, tmp_path, measured):
    assert measured(_train(case, tmp_path / "out", "bfloat16")) <= ranks.BF16_MARGIN * bf16_error


@two_gpus
@pytest.mark.parametrize(
    "words",
    [
        ("model.pipeline_model_parallel_size=2",),
        ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"),
        ("model.tensor_model_parallel_size=2",),
        ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
        (),  # two replicas
    ],
)
def test_two_gpus_in_fp32_give_what_peft_gives(case, tmp_path, measured, words):
    assert measured(_train(case, tmp_path / "out", "float32", *words, world=2)) <= TOLERANCE
