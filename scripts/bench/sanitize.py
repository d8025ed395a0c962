"""Every kernel once on small inputs, for compute-sanitizer:

compute-sanitizer --tool memcheck  python scripts/bench/sanitize.py
compute-sanitizer --tool racecheck python scripts/bench/sanitize.py
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests" / "unit" / "kernels"))

from kernel_cases import random_case, run
from mlp_cases import fused, random_mlp

from lorafusion_megatron.lora.triton_backend import TritonBackend

for strategy in ("hopper", "fused", "expand"):
    for dtype, ranks in ((torch.bfloat16, [16]), (torch.float16, [5, 24, 100]), (torch.float32, [16])):
        case = random_case(
            3, tokens=331, size=(256, 320), slots=3, dtype=dtype, device="cuda", ranks=ranks, projections=2, bias=True
        )
        result = run(TritonBackend(strategy=strategy), case)
        torch.cuda.synchronize()
        print(
            strategy,
            dtype,
            ranks,
            "finite:",
            all(bool(t.isfinite().all()) for t in (result.y, result.dx, *result.grads)),
        )

for dtype, ranks in ((torch.bfloat16, [16]), (torch.float16, [5, 24]), (torch.float32, [16])):
    mlp = random_mlp(3, tokens=700, hidden=256, features=768, slots=6, dtype=dtype, device="cuda", ranks=ranks)
    results = fused(TritonBackend(), mlp)
    torch.cuda.synchronize()
    print("swiglu", dtype, ranks, "finite:", all(bool(t.isfinite().all()) for t in results))
