#!/usr/bin/env bash
# The kernel figures of docs/benchmarks.md. Needs one GPU; about five minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/bench}
mkdir -p "$out"
bench=(python3 -m lorafusion_megatron.cli.main bench linear)
"${bench[@]}" --shapes llama-8b,square-8k --adapters 1,4 --compile --json "$out/linear.json" --plot "$out/linear.png"
"${bench[@]}" --adapters 32 --rank mixed --json "$out/linear_mixed.json"
"${bench[@]}" --adapters 1 --rank 8,64,128 --json "$out/linear_ranks.json"
"${bench[@]}" --adapters 1 --dropout 0 --json "$out/linear_no_dropout.json"
"${bench[@]}" --adapters 1 --tokens 2048,16384 --json "$out/linear_tokens.json"
"${bench[@]}" --adapters 1 --shapes qwen2.5-32b,qwen2.5-32b-tp4,llama-70b,llama-70b-tp4 --json "$out/linear_models.json"
