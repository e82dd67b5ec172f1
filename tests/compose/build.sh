#!/bin/bash
# Builds the image of the tests: ENDIO_IMAGE (endio:test).
#
#   tests/compose/build.sh              by the Dockerfile, with the profile PROFILE (dev: it builds in
#                                       half the time, and what the tests look for does not depend on it)
#   tests/compose/build.sh DIRECTORY    by the Dockerfile too, but for the binaries: those in DIRECTORY,
#                                       such as target/debug, for which this machine must be a Debian
#                                       as old as the base image, or older
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
image=${ENDIO_IMAGE:-endio:test}
binaries=${1:+$(realpath "$1")}
"$root/tests/compose/base-images.sh"
begun=$SECONDS
if [ -z "$binaries" ]; then
    docker build -q --build-arg "PROFILE=${PROFILE:-dev}" -t "$image" "$root"
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    for name in endio endio-conversion endio-block-store endio-writeback; do
        strip --strip-debug -o "$work/$name" "$binaries/$name"
    done
    base=$(docker build -q --target runtime "$root")
    printf 'FROM %s\nCOPY endio* /usr/local/bin/\n' "$base" >"$work/Dockerfile"
    docker build -q -t "$image" "$work"
    # A newer C library than the image's shows here.
    docker run --rm "$image" endio --version
fi
echo "built $image in $((SECONDS - begun)) s"
