#!/usr/bin/env bash
# The demo: three jobs trained together on a real small model in two pipeline stages on CPU, then compared with the
# base model by Transformers and PEFT alone. 3 to 8 minutes on two cores, once the model is there.
# Usage: scripts/demo/run.sh [key=value ...]     overrides of scripts/demo/demo.yaml
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${VENV:-.venv}/bin
out=runs/demo
# Everything is on the disk after the first step; nothing here asks a model hub.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n== %s\n' "$1"; }

say "1 of 3: the base model"
model=$("$bin/python" scripts/demo/prepare.py)

say "2 of 3: training pirate, orders and telegram together"
rm -rf "$out"
# bfloat16 where the CPU has instructions for it; without them it takes many times as long as float32.
dtype=$("$bin/python" -c "from lorafusion_megatron.training.cpu_dtype import fastest_dtype; print(fastest_dtype())")
# One thread a stage: the two stages compute at the same time.
OMP_NUM_THREADS=1 "$bin/torchrun" --standalone --nproc-per-node 2 -m lorafusion_megatron.train \
    scripts/demo/demo.yaml "base_model.path=$model" "base_model.dtype=$dtype" "checkpoint.save=$out" "$@"

say "3 of 3: held-out data, judged by Transformers and PEFT alone"
# Transformers warns of a name of its own that PEFT still uses.
PYTHONWARNINGS=ignore::FutureWarning "$bin/python" scripts/demo/evaluate.py "$model" "$out" --json "$out/evaluation.json"
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; adapters: $out/{pirate,orders,telegram}; figures: $out/evaluation.json"
