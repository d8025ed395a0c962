#!/usr/bin/env bash
# Train a run file with torchrun: see scripts/torchrun/train.sh, which this is the short name of.
exec "$(dirname "$0")/torchrun/train.sh" "$@"
