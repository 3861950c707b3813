#!/usr/bin/env bash
# Runs one qstar command as N processes on this machine, connected over loopback, to try a multi-host run locally.
#   N=2 launch/processes.sh dpo --model MODEL --out runs/two --data.train pairs.jsonl ...
set -euo pipefail
export JAX_NUM_PROCESSES=${N:?number of processes} JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12345}
others=()
for ((id = 1; id < N; id++)); do
    JAX_PROCESS_ID=$id qstar "$@" --mesh.multi_process true &
    others+=($!)
done
code=0
JAX_PROCESS_ID=0 qstar "$@" --mesh.multi_process true || code=$?
for process in "${others[@]}"; do
    wait "$process" || code=$? # where one fails, so does the command
done
exit "$code"
