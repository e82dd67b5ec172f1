#!/bin/bash
# Checks the manifests of k8s/ without a cluster (check.py tells what).
#
#   tests/k8s/run.sh DIRECTORY-OF-BINARIES     such as target/debug
#
# Needs python3 (3.11 or later) with venv, and the package registry of Python once. What is missing
# makes it fail; with ENDIO_OFFLINE=1 in the environment it then says so and exits with 0.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
binaries=$(realpath "$1")
venv=${CARGO_TARGET_DIR:-$here/../../target}/k8s-venv
give_up() {
    if [ -n "${ENDIO_OFFLINE:-}" ]; then
        echo "skip manifests: $*"
        exit 0
    fi
    echo "FAIL manifests: $*" >&2
    exit 1
}
command -v python3 >/dev/null || give_up "python3 is not installed"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || give_up "python3 is older than 3.11"
if ! "$venv/bin/python" -c 'import kubernetes_validate' 2>/dev/null; then
    python3 -m venv --clear "$venv" || give_up "python3 has no venv (package python3-venv)"
    "$venv/bin/pip" install -q --disable-pip-version-check kubernetes-validate==1.37.0 ||
        give_up "kubernetes-validate cannot be installed"
fi
exec "$venv/bin/python" "$here/check.py" "$binaries"
