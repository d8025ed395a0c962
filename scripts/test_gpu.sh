#!/usr/bin/env bash
# Every test that a GPU can run, and a report of them: scripts/test_gpu.sh [FOLDER [PYTEST OPTIONS]]
#
# Writes FOLDER/machine.txt (cards, driver, versions), FOLDER/tests.xml and FOLDER/tests.txt (default runs/gpu_tests).
# Tests that need two GPUs skip themselves on one. With pytest-xdist, -n 9 (or -n 12 on one GPU) takes a third of the
# time: most of it goes into compiling kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu_tests}
[ $# -gt 0 ] && shift
mkdir -p "$out"
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    python3 - <<'PYTHON'
import importlib.metadata as metadata

for name in ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "peft"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
PYTHON
} | tee "$out/machine.txt"
status=0
python3 -m pytest tests/gpu tests/unit/kernels tests/unit/mcore -ra "$@" --junitxml "$out/tests.xml" 2>&1 | tee "$out/tests.txt" || status=$?
echo "report: $out"
exit "$status"
