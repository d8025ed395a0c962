#!/usr/bin/env bash
# Trains a run file with one rank per GPU, on one host or several; Ctrl-C and SIGTERM save and end it with status 75.
#
#     scripts/torchrun/train.sh RUN.yaml [key=value …]
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 scripts/torchrun/train.sh RUN.yaml     on every host, with its own NODE_RANK
#
# Environment variables: PYTHON (default python3), NPROC (ranks on this host; default its GPUs, or 1), MASTER_PORT.
set -euo pipefail
: "${1:?usage: scripts/torchrun/train.sh RUN.yaml [key=value …]}"

python=${PYTHON:-python3}
ranks=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
meeting=(--standalone)  # a free port, so that two runs can share the host
if [ "${NNODES:-1}" != 1 ]; then
    meeting=(--nnodes="$NNODES" --node-rank="${NODE_RANK:?}" --master-addr="${MASTER_ADDR:?}")
    meeting+=(--master-port="${MASTER_PORT:-29500}")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# torchrun would pass a signal on and kill the ranks 30 s later, saved or not: it gets none, and they get it from here.
"$python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node="$ranks" --signals-to-handle=SIGQUIT \
    -m lorafusion_megatron.train "$@" &
torchrun=$!
stopping=
trap 'stopping=1 again=1; pkill -TERM -P "$torchrun" || true' INT TERM USR1
again=1
while [ -n "$again" ]; do  # a trapped signal ends wait early
    again=
    wait "$torchrun" && status=0 || status=$?
done
[ -z "$stopping" ] || [ "$status" = 0 ] || exit 75
exit "$status"
