#!/usr/bin/env bash
# In a container of GKE, where xpk.sh has it called: takes the place of the shell, which would keep SIGTERM to itself.
# On TPUs JAX finds its partners; of GPUs, xpk says the number of nodes, and which one this is.
set -euo pipefail
if [ -n "${NNODES:-}" ]; then
    export JAX_NUM_PROCESSES=$NNODES JAX_PROCESS_ID=${NODE_RANK:?xpk sets it} # one process per node, of all its GPUs
    export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:?xpk sets it}:${JAX_COORDINATOR_PORT:?xpk sets it}
fi
exec qstar "$@" --resume auto --mesh.multi_process true
