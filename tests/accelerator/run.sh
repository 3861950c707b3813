#!/usr/bin/env bash
# Checks and measures this library on the accelerator of this machine, within eight minutes:
#
#     tests/accelerator/run.sh [--tiny] [--parts machine,correctness] [--out FOLDER]
#
# --tiny runs the same in small, on any machine. The report is FOLDER/report.json (default: $OUT, or runs/accelerator).
# What the interpreter ($PYTHON, or python3) lacks is taken from tests/accelerator/wheels/, which wheels.sh fills.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

# Wheels go to a folder of their own, which is gone afterwards: the machine's packages stay as they are.
if compgen -G "$here/wheels/*.whl" >/dev/null; then
    site=$(mktemp -d); trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$here"/wheels/*.whl ||
        echo "$here/wheels is not for this $python; wheels.sh takes its version" >&2
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

missing=$("$python" - <<'END'
from importlib.util import find_spec
needed = """jax flax optax orbax einops chex jaxtyping transformers datasets jsonargparse docstring_parser
    typeshed_client tensorboardX psutil torch trl""".split()
print(*(name for name in needed if find_spec(name) is None))
END
)
[ -z "$missing" ] || echo "$python lacks $missing: pip install -e '.[cuda13,parity,bench]', or carry the wheels that" \
    "tests/accelerator/wheels.sh downloads." >&2

"$python" "$here/run.py" "$@"
