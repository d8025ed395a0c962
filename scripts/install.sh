#!/usr/bin/env bash
# Makes the virtual environment and installs the package with what its tests need, at the versions that were tested.
# Usage: scripts/install.sh VENV
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

python=$(scripts/find_python.sh)
if [ ! -x "$venv/bin/python" ]; then
    echo "making $venv with $python"
    "$python" -m venv "$venv"
fi
echo "installing (PyTorch with its CUDA libraries is about 3 GB the first time)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint tests/constraints.txt --editable '.[dev]'
