#!/usr/bin/env bash
# Runs a job file on hosts that ssh reaches without a password: a scheduler here, a worker on each of them.
#
#   run.sh job.yaml host1 host2 …
#
# All hosts have the same environment at the same path, and see the same files, or the job file names an object store.
# Ended with Ctrl-C, the same call goes on where it was; workers end by themselves when the scheduler is gone.
set -euo pipefail
job=${1:?run.sh JOB HOST…}
shift
: "${1:?run.sh JOB HOST…}"
ADDRESS=${ADDRESS:-$(hostname -I | cut -d ' ' -f 1)} # of this host, as the others reach it
PORT=${PORT:-8786}
BIN=${BIN:-$(dirname "$(command -v dask-influence)")} # of the environment, on every host
CORES=${CORES:-4}                                    # of each worker, all of which torch uses
MEMORY=${MEMORY:-16GiB}                              # of each worker
SCRATCH=${SCRATCH:-/tmp}

"$BIN/dask" scheduler --host "$ADDRESS" --port "$PORT" --dashboard-address "$ADDRESS:0" &
scheduler=$!
trap 'kill "$scheduler" 2> /dev/null; wait' EXIT

worker=("$BIN/dask" worker "tcp://$ADDRESS:$PORT" --nthreads 1 --memory-limit "$MEMORY" --death-timeout 60)
worker+=(--local-directory "$SCRATCH" --no-dashboard)
for host in "$@"; do
    # shellcheck disable=SC2029 # the command is put together here, on purpose
    ssh -o BatchMode=yes -o ServerAliveInterval=30 "$host" \
        "env OMP_NUM_THREADS=$CORES MKL_NUM_THREADS=$CORES OPENBLAS_NUM_THREADS=$CORES $(printf '%q ' "${worker[@]}")" &
done

export DASK_INFLUENCE__TORCH_THREADS=$CORES DASK_INFLUENCE__WAIT_FOR_WORKERS="${WAIT:-300 s}"
"$BIN/dask-influence" run "$job" --scheduler-address "tcp://$ADDRESS:$PORT"
