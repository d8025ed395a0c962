#!/usr/bin/env bash
# Prints the path of a Python >= 3.12: the one on PATH under its usual names, else one that pyenv keeps.
set -euo pipefail

works() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

roots=("${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || true)" "$HOME/.pyenv")
candidates=(python3.12 python3.13 python3.14 python3 python)
for root in "${roots[@]}"; do
    [ -n "$root" ] && candidates+=("$root"/versions/3.12*/bin/python "$root"/versions/3.1[34]*/bin/python)
done
for candidate in "${candidates[@]}"; do
    # A shim of pyenv is on PATH for every version that some folder has, and fails where none is chosen: try it.
    if path=$(command -v "$candidate" 2>/dev/null) && works "$path"; then
        "$path" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done
echo "error: no Python >= 3.12 with venv found; install one (apt-get install python3.12-venv, or pyenv install 3.12)" >&2
exit 1
