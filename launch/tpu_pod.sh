#!/usr/bin/env bash
# Runs one qstar command on every host of a Cloud TPU slice; the hosts find each other.
#   TPU=my-pod ZONE=us-central2-b launch/tpu_pod.sh dpo --config configs/dpo_tldr.yaml --model MODEL --out RUN ...
# RUN and the data lie on a file system that all hosts share.
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
words=$(printf '%q ' "$@")
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
    --command "cd qstar_jax && pip install -q -e '.[tpu]' && qstar $words --mesh.multi_process true"
