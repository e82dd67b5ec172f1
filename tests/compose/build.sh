#!/bin/bash
# Builds the image of the tests from the Dockerfile: ENDIO_IMAGE (endio:test), with the profile PROFILE
# (dev: it builds in half the time, and what the tests look for does not depend on it).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
"$root/tests/compose/base-images.sh"
begun=$SECONDS
docker build -q --build-arg "PROFILE=${PROFILE:-dev}" -t "${ENDIO_IMAGE:-endio:test}" "$root"
echo "built ${ENDIO_IMAGE:-endio:test} in $((SECONDS - begun)) s"
