#!/usr/bin/env bash
# Downloads into tests/accelerator/wheels/ what a machine with JAX, Flax, Optax, Orbax, torch and transformers, but without
# a network, lacks for run.sh:
#
#     tests/accelerator/wheels.sh [PYTHON_VERSION]    default: 3.12, on x86-64 Linux
#
# $PIP is the pip that downloads (default: pip). Fails if the wheels take more than 60 MiB.
set -euo pipefail
version=${1:-3.12}
wheels=$(cd "$(dirname "$0")" && pwd)/wheels
limit_mib=60

packages=(
    jsonargparse==4.53.0 docstring-parser==0.18.0 typeshed-client==2.15.0  # command lines
    datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19                      # TRL reads its pairs from these
    tensorboardX==2.6.5                                                    # metrics of a run
    trl==1.16.0                                                            # what we compare with
)

platforms=()
for glibc in 2_28 2_27 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
rm -rf "$wheels"
${PIP:-pip} download -q --no-deps --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}" \
    --dest "$wheels" "${packages[@]}"

kib=$(du -sk "$wheels" | cut -f1)
echo "$wheels: ${#packages[@]} wheels, $((kib / 1024)) MiB"
if [ "$kib" -gt $((limit_mib * 1024)) ]; then
    echo "more than $limit_mib MiB" >&2
    exit 1
fi
