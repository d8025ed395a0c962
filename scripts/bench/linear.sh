#!/usr/bin/env bash
# The kernel figures of docs/benchmarks.md: four Llama-8B shapes, 1, 4 and 32 adapters. Needs one GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/bench}
mkdir -p "$out"
bench=(python3 -m lorafusion_megatron.cli.main bench linear)
"${bench[@]}" --adapters 1,4 --compile --json "$out/linear.json" --plot "$out/linear.png"
"${bench[@]}" --adapters 32 --rank mixed --json "$out/linear_mixed.json"
