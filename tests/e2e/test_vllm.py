"""vLLM's own loader reads the adapters, where vLLM is installed: it is too large to be a dependency of the tests.

`lora.worker_manager` of vLLM reads an adapter so: `PEFTHelper.from_local_dir`, its `validate_legal`, and
`LoRAModel.from_local_checkpoint` with the names of the model's linears.
"""

import pytest
import torch

from lorafusion_megatron.config.targets import HF_TARGETS
from tests import launch, tiny

lora_model = pytest.importorskip("vllm.lora.lora_model", reason="needs vLLM")
peft_helper = pytest.importorskip("vllm.lora.peft_helper", reason="needs vLLM")
vllm_config = pytest.importorskip("vllm.config.lora", reason="needs vLLM")

JOBS = {
    "plain": {"r": 4},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "fused": {"r": 3, "target_modules": ["linear_qkv", "linear_fc1"]},
    "some_layers": {"r": 16, "alpha": 2.5, "layers_to_transform": [1, 3]},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of jobs of every kind, and the deltas that PEFT merges for them."""
    folder = tmp_path_factory.mktemp("vllm")
    tiny.write_base(folder / "base")
    jobs = [tiny.job(folder, name, steps=2, **peft) for name, peft in JOBS.items()]
    launch.train(tiny.write_run(folder, jobs))
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_the_adapter_that_vllm_reads_is_the_one_that_peft_merges(run, name, monkeypatch):
    monkeypatch.setattr(lora_model, "PIN_MEMORY", False)  # there may be no driver
    folder = str(run / "out" / name)
    helper = peft_helper.PEFTHelper.from_local_dir(folder, 256)
    helper.validate_legal(vllm_config.LoRAConfig(max_lora_rank=16, max_loras=1))
    read = lora_model.LoRAModel.from_local_checkpoint(
        folder, set(HF_TARGETS), helper, device="cpu", dtype=torch.float32
    )
    deltas = _peft_deltas(run / "base", folder)
    assert set(read.loras) == set(deltas)
    for module, layer in read.loras.items():
        torch.testing.assert_close(layer.scaling * layer.lora_b @ layer.lora_a, deltas[module], rtol=1e-5, atol=1e-6)


def _peft_deltas(base, folder) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
