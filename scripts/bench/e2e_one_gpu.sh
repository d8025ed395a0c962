#!/usr/bin/env bash
# The one-GPU figures of docs/benchmarks.md, "Whole runs": Llama 3.1 8B's shape, 16 of its 32 layers. One GPU of 80 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/bench/e2e_one_gpu}
python3 -m lorafusion_megatron.cli.main bench e2e --model llama-3.1-8b --layers 16 --capacity 6144 --sizes 6144 \
    --only "sequential,kernels only,schedule only,both,no adapters" --tokens 120000 --baseline-tokens 60000 \
    --repeats 3 --clocks --out "$out"
