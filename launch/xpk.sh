#!/usr/bin/env bash
# Trains on GKE, on TPUs or GPUs, through xpk (`pip install xpk`) and an image made from launch/Dockerfile.
#   launch/xpk.sh --cluster C --workload tldr --docker-image IMAGE --tpu-type v5litepod-256 --num-slices 2 \
#       -- dpo --config configs/dpo_tldr.yaml --model MODEL --data.train FILE --out RUN ...
#   launch/xpk.sh ... --device-type h100-80gb-8 --num-nodes 4 -- dpo ...
# What stands before `--` are options of `xpk workload create`, and override those below. A run that is preempted saves,
# exits with 75, and is started again; so is one whose host dies. It ends at a wrong option or input (2) or a failure (1).
# `xpk workload list --cluster C` shows it, `xpk workload delete --cluster C --workload tldr` removes it.
set -euo pipefail
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
if [ $# -lt 2 ]; then
    sed -n '3,5s/^# *//p' "$0" >&2
    exit 2
fi
shift

# xpk writes the command into YAML, between double quotes too, and Kubernetes and a shell read it afterwards.
command="exec launch/gke_host.sh"
for word in "$@"; do
    case $word in
    *[\"\'\\\$\`]* | *$'\n'*)
        echo "xpk.sh: quotes, backslashes, dollars and newlines do not reach the run: $word; put them into a file for --config" >&2
        exit 2
        ;;
    *[!a-zA-Z0-9_./:=,@%+-]* | "") command+=" '$word'" ;;
    *) command+=" $word" ;;
    esac
done
# 30 seconds, which xpk gives a pod to end, are short for a checkpoint.
xpk workload create --max-restarts 50 --restart-on-exit-codes 75 --termination-grace-period-seconds 300 \
    "${options[@]}" --command "$command"
