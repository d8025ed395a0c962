#!/usr/bin/env bash
# The two-GPU figures of docs/benchmarks.md, "Whole runs": Qwen2.5 32B's shape, 25 of its 64 layers in two pipeline stages
# (13 + 12 and the output layer: as even as the whole model's), every baseline at three microbatch sizes. Two GPUs of
# 80 GB. LAYERS=17 takes two thirds of the time.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/bench/e2e_two_gpus}
torchrun --standalone --nproc-per-node 2 -m lorafusion_megatron.cli.main bench e2e --model qwen2.5-32b \
    --layers "${LAYERS:-25}" --pipeline 2 --capacity 4096 --sizes 1024,2048,4096 --tokens 240000 \
    --baseline-tokens 60000 --repeats 3 --clocks --out "$out"
