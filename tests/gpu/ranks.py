"""What the ranks of GPU tests run: the command line with something watched, and the oracle in bf16."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

BF16_MARGIN = 1.5
"""How much further from fp32 than PEFT's own bf16 run this package's may be: adapters are rounded to bf16 here, where
PEFT keeps them in fp32, and the kernels order their sums otherwise."""


def train_and_watch(words: list[str], out: str) -> int:
    """Train as the command line does; keep the allocated bytes of this rank after each optimizer step."""
    import os

    from lorafusion_megatron.cli.main import main
    from lorafusion_megatron.training.trainer import Trainer

    seen: list[int] = []
    original = Trainer._on_applied

    def watched(self: Any, *args: Any) -> Any:
        seen.append(torch.cuda.memory_allocated())
        return original(self, *args)

    Trainer._on_applied = watched  # type: ignore[method-assign]
    status = main(["train", *words])
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(seen))
    return status


def fail_on_the_last_rank(words: list[str]) -> int:
    """Train, but the last rank raises at its second optimizer step, with the others in the middle of messages."""
    import os

    from lorafusion_megatron.cli.main import main
    from lorafusion_megatron.training.trainer import Trainer

    original = Trainer._on_applied

    def failing(self: Any, index: int, step: int) -> Any:
        if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1) and step == 2:
            raise ValueError("a fault of the second step")
        return original(self, index, step)

    Trainer._on_applied = failing  # type: ignore[method-assign]
    return main(["train", *words])


def bf16_oracle(folder: str, out: str) -> None:
    """The oracle's training with the base model in bf16: how far bf16 alone takes PEFT from its own fp32 result."""
    import transformers

    from tests.oracle import peft_oracle

    original = transformers.AutoModelForCausalLM.from_pretrained

    def in_bf16(path: str, **options: Any) -> Any:
        return original(path, **options | {"dtype": torch.bfloat16})

    transformers.AutoModelForCausalLM.from_pretrained = in_bf16
    run = yaml.safe_load(Path(folder, "run.yaml").read_text())
    for job in run["jobs"]:
        peft_oracle.train_job(run, job, Path(out, job["name"]))


def count_synchronisations(out: str, microbatches: list[int]) -> int:
    """Run windows of several lengths under the profiler; keep the calls of each kind that make the host wait."""
    from torch.profiler import ProfilerActivity, profile

    from lorafusion_megatron.mcore import parallel
    from lorafusion_megatron.mcore.build import transformer_engine_missing
    from lorafusion_megatron.scheduler.options import PlanOptions
    from lorafusion_megatron.training.bench.measure import Bench, Setting, make_adapters, make_backend
    from lorafusion_megatron.training.bench.variants import Variant
    from lorafusion_megatron.training.bench.workloads import make_workload, shape
    from lorafusion_megatron.types import Topology

    world = int(__import__("os").environ["WORLD_SIZE"])
    spec = shape("tiny", None)
    topology = Topology(pipeline_parallel=world)
    groups = parallel.start(topology, device="cuda", seed=1, timeout_minutes=2.0)
    backend = make_backend(groups.device)
    bench = Bench(
        Setting(
            spec=spec,
            topology=topology,
            layers_per_chunk=(4 // world,) * world,
            transformer_impl="local" if transformer_engine_missing() else "transformer_engine",
            dtype=torch.bfloat16,
            backend=backend,
            adapters=make_adapters(4, rank=16, alpha=32.0, dropout=0.1),
        ),
        groups,
    )
    variant = Variant(name="both", adapters="fused", order="staggered", capacity=1024)
    options = PlanOptions(token_capacity=1024, padding_multiple=backend.tile, stages=world)
    counts = []
    for tokens in microbatches:
        workload = make_workload("xsum", tokens=tokens * 1024, batch_size=4, vocab_size=spec.vocab_size, longest=1024)
        bench.run(workload, [variant], options, repeats=1, baseline_tokens=0)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            outcome = bench.run(workload, [variant], options, repeats=1, baseline_tokens=0)[0]
        waits: dict[str, int] = {}
        for event in profiler.events():
            if "Synchronize" in event.name:
                waits[event.name] = waits.get(event.name, 0) + 1
        counts.append({"microbatches": outcome.plan.schedule.num_microbatches, "waits": waits})
    parallel.stop()
    if groups.pp_rank == 0:
        Path(out).write_text(json.dumps(counts))
    return 0


def bridge_lora(words: list[str]) -> int:
    """The example script for Megatron-Bridge."""
    import runpy
    import sys

    sys.argv = ["bridge_lora.py", *words]
    status: int = runpy.run_path("scripts/examples/bridge_lora.py")["main"]()
    return status
