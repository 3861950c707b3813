#!/usr/bin/env bash
# On one host of a TPU slice, where tpu_pod.sh calls it: installs what is missing, and starts a qstar command in tmux.
#   EXTRAS=tpu tpu_host.sh SESSION dpo --config ...     # the log is ~/SESSION.log
set -euo pipefail
session=$1
shift
cd "$(dirname "$0")/.."
if [ "${TMUX_SESSION:-}" = "$session" ]; then # inside
    code=0
    .venv/bin/qstar "$@" --resume auto --mesh.multi_process true >>"$HOME/$session.log" 2>&1 || code=$?
    echo "$(date -u +%FT%TZ) qstar $1 ended with $code" >>"$HOME/$session.log"
    exit
fi
# The system's Python is older than this library needs, so uv brings one. The stamp is written last: an installation that
# broke off is done again.
wanted=$(echo "$EXTRAS" | cat pyproject.toml - | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
    python3 -m uv venv -q --clear --python 3.12 .venv
    python3 -m uv pip install -q --python .venv/bin/python -e ".[$EXTRAS]"
    echo "$wanted" >.venv/installed
fi
tmux new-session -d -s "$session" env TMUX_SESSION="$session" launch/tpu_host.sh "$session" "$@"
echo "$(hostname): started"
