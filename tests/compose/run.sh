#!/bin/bash
# Docker compose for real: builds the image, starts docker-compose.yml, writes over NBD and gRPC from
# outside, kills, freezes, stops and disconnects containers meanwhile, checks the data, and takes
# everything away again. Then the demonstration of docker-compose.yml, as a user would run it.
#
#   tests/compose/run.sh              the image is built by the Dockerfile
#   tests/compose/run.sh DIRECTORY    but for the binaries, which are those of this directory: minutes less
#
# Where docker is missing it says so and exits with 0.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
skip() { echo "skip containers: $*"; exit 0; }
docker info >/dev/null 2>&1 || skip "no docker that answers"
if docker compose version >/dev/null 2>&1; then
    compose() { docker compose "$@"; }
elif command -v docker-compose >/dev/null; then
    compose() { docker-compose "$@"; }
else
    skip "docker compose is not installed"
fi
export ENDIO_IMAGE=${ENDIO_IMAGE:-endio:test}

for profile in tools demo; do
    compose --profile "$profile" config -q
done
echo "ok   docker-compose.yml is valid with every profile"
# deploy/insecure.yml repeats commands: but for TLS they must be the same.
commands() {
    compose "$@" config |
        sed -n '/^  [a-z]/p; /^    command:/,/^    [a-z]/p; /^      test:/,/^      [a-z]/p' |
        grep -vE -- '^    [a-z]|^      [a-z]|- (--tls-dir=.*|--insecure-any-address)$' |
        grep -vE -- '- (env|-u|ENDIO_TLS_DIR)$' | sed 's/https:/http:/'
}
if ! diff <(commands) <(commands -f docker-compose.yml -f deploy/insecure.yml) ||
    [ "$(grep -c -- --insecure-any-address, deploy/insecure.yml)" -ne 4 ]; then
    echo "FAIL deploy/insecure.yml has other commands than docker-compose.yml"
    exit 1
fi
echo "ok   deploy/insecure.yml starts the same without TLS"
tests/compose/build.sh "$@"

tests/chaos/run.sh short tls

# The demonstration, with names and ports of its own.
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
COMPOSE_PROJECT_NAME=endio-demo-$$ ENDIO_GRPC_PORT=$(port) ENDIO_NBD_PORT=$(port)
export COMPOSE_PROJECT_NAME ENDIO_GRPC_PORT ENDIO_NBD_PORT
out=$(mktemp)
clean() {
    compose --profile demo down -v --remove-orphans -t 5 >/dev/null 2>&1
    rm -f "$out"
}
trap clean EXIT
if timeout 1200 bash -c "$(declare -f compose); compose run --rm demo" >"$out" 2>&1 </dev/null; then
    grep -q 'generation of the volume' "$out" && grep -q 'clean' "$out"
    echo "ok   the demonstration"
else
    cat "$out"
    compose --profile demo logs --tail=40
    echo "FAIL the demonstration"
    exit 1
fi
