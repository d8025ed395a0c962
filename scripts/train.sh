#!/usr/bin/env bash
# Train a run file on this machine's GPUs, a process each: scripts/train.sh RUN.yaml [key=value ...]
#
#   NPROC=2 scripts/train.sh RUN.yaml model.pipeline_model_parallel_size=2     # so many processes (default: one a GPU)
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 scripts/train.sh RUN.yaml ...        # on each of several machines
#
# Start the same command again to go on where a stopped run was. SLURM: scripts/slurm.
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -ge 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
where=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
    where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?the number of this machine, from 0}"
           --master-addr "${MASTER_ADDR:?the first machine}" --master-port "${MASTER_PORT:-29500}")
fi
# One thread a process feeds the GPU; more would only fight for cores with the other processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun "${where[@]}" --nproc-per-node "$nproc" -m lorafusion_megatron.train "$@"
