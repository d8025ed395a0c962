"""Many LoRA jobs on a model that Megatron-Bridge built. Needs GPUs and Megatron-Bridge.

torchrun --nproc-per-node 2 scripts/examples/bridge_lora.py RUN.yaml model.pipeline_model_parallel_size=2
"""

import sys

import torch
from megatron.bridge import AutoBridge

from lorafusion_megatron.config import load_run
from lorafusion_megatron.integrations.megatron_bridge import train_models


def main() -> int:
    """Build the base model of the run file with AutoBridge, then train the jobs on it."""
    run = load_run(sys.argv[1], sys.argv[2:])
    bridge = AutoBridge.from_hf_pretrained(str(run.base_model.path))
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.tensor_model_parallel_size = run.model.tensor_model_parallel_size
    provider.pipeline_model_parallel_size = run.model.pipeline_model_parallel_size
    provider.virtual_pipeline_model_parallel_size = run.model.virtual_pipeline_model_parallel_size
    provider.sequence_parallel = run.model.sequence_parallel
    provider.pipeline_dtype = provider.params_dtype = getattr(torch, run.base_model.dtype)
    provider.bf16 = run.base_model.dtype == "bfloat16"
    provider.cross_entropy_loss_fusion = run.base_model.dtype != "float32"  # it rounds to bfloat16
    provider.gradient_accumulation_fusion = False  # needs Apex, and the base model has no gradients
    provider.finalize()
    provider.initialize_model_parallel(seed=run.runtime.seed)
    models = provider.provide_distributed_model(wrap_with_ddp=False)
    return 0 if train_models(models, run) else 75


if __name__ == "__main__":
    sys.exit(main())
