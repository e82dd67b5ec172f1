#!/bin/bash
# Chaos on the project's own containers; chaos.py tells what.
#
#   tests/chaos/run.sh list
#   tests/chaos/run.sh SCENARIO…|all|short
#
# Takes the image ENDIO_IMAGE (endio:test), which tests/compose/run.sh builds, or is built here if it
# is not there. Needs docker, docker compose and libnbd for python (tests/clients/install.sh); where
# they are missing it says so and exits with 0.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
skip() { echo "skip containers: $*"; exit 0; }
# The system's python has the module nbd, another one in PATH need not have it.
export PATH="/usr/bin:/bin:/usr/sbin:/sbin:$PATH"
if [ "${1:-}" != list ]; then
    docker info >/dev/null 2>&1 || skip "no docker that answers"
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null ||
        skip "docker compose is not installed"
    python3 -c 'import nbd' 2>/dev/null ||
        skip "python has no module nbd (tests/clients/install.sh)"
    export ENDIO_IMAGE=${ENDIO_IMAGE:-endio:test}
    docker image inspect "$ENDIO_IMAGE" >/dev/null 2>&1 || "$here/../compose/build.sh"
fi
exec python3 "$here/chaos.py" "$@"
