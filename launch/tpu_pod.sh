#!/usr/bin/env bash
# Trains on a Cloud TPU slice (or several: NODES=2), requested as a queued resource; its hosts discover each other.
#   export TPU=my-pod ZONE=us-west4-a
#   TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite launch/tpu_pod.sh create --spot    # the options are gcloud's
#   launch/tpu_pod.sh state                       # until it says ACTIVE
#   launch/tpu_pod.sh run dpo --config configs/dpo_tldr.yaml --model MODEL --out RUN ...
#   launch/tpu_pod.sh log                         # follows the first host's log; Ctrl-C ends the view, not the run
#   launch/tpu_pod.sh stop                        # saves first; the same `run` goes on, on a new slice too
#   launch/tpu_pod.sh delete                      # asks first; nothing else deletes the slice
# `run` copies this clone to all hosts, as it is apart from new files that git does not know, installs what it needs if
# that has changed, and starts the command in tmux, where it stays when this machine leaves. RUN and the data must be
# where all hosts see them. EXTRAS=tpu,judge installs other extras. The states, and what survives: launch/README.md.
set -euo pipefail
usage() { sed -n '3,9s/^# *//p' "$0" >&2 && exit 2; }
[ $# -gt 0 ] || usage
: "${TPU:?name of the queued resource}" "${ZONE:?its zone}"
tpus() { gcloud compute tpus queued-resources "$1" "$TPU" --zone "$ZONE" "${@:2}"; }
on_hosts() { tpus ssh --node=all --worker=all --command "$1"; }
session=qstar

verb=$1
shift
case $verb in
create)
    nodes=(--node-id "$TPU")
    [ "${NODES:-1}" -eq 1 ] || nodes=(--node-count "$NODES")
    tpus create --accelerator-type "${TYPE:?such as v5litepod-16}" --runtime-version "${VERSION:?such as v2-alpha-tpuv5-lite}" \
        "${nodes[@]}" "$@"
    ;;
state) tpus describe --format "value(state.state)" ;;
run)
    [ $# -gt 0 ] || usage
    archive=$(mktemp -d)
    trap 'rm -rf "$archive"' EXIT
    cd "$(dirname "$0")/.."
    changed=$(git -c user.name=launch -c user.email=launch stash create) # a commit of what has changed; empty if nothing has
    git archive --format=tar.gz -1 --output "$archive/qstar_jax.tar.gz" "${changed:-HEAD}" . ':!tests'
    gcloud compute tpus queued-resources scp "$archive/qstar_jax.tar.gz" "$TPU:" --zone "$ZONE" --node=all --worker=all
    # Modules that are gone from here must be gone there; runs and the environment stay.
    on_hosts "! tmux has-session -t =$session 2>/dev/null || { echo 'a command is running: stop it first' >&2; exit 1; }
        mkdir -p qstar_jax && rm -rf qstar_jax/qstar_jax && tar xzf qstar_jax.tar.gz -C qstar_jax &&$(printf ' %q' \
        env EXTRAS="${EXTRAS:-tpu}" qstar_jax/launch/tpu_host.sh "$session" "$@")"
    ;;
log) tpus ssh --node=0 --worker=0 --command "tail -n 100 -F $session.log" ;;
stop) on_hosts "tmux send-keys -t =$session: C-c" ;;
delete) tpus delete --force ;;
*) usage ;;
esac
