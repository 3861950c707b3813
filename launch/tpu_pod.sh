#!/usr/bin/env bash
# Runs one qstar command on every host of a Cloud TPU slice; the hosts discover each other.
#   TPU=my-pod ZONE=us-central2-b launch/tpu_pod.sh dpo --config configs/dpo_tldr.yaml --model MODEL --out RUN ...
# RUN and the data must be on a file system shared by all hosts.
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
arguments=$(printf '%q ' "$@")
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
    --command "cd qstar_jax && pip install -q -e '.[tpu]' && qstar $arguments --mesh.multi_process true"
