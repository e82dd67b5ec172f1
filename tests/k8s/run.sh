#!/bin/bash
# Checks the manifests of k8s/ without a cluster (check.py tells what).
#
#   tests/k8s/run.sh DIRECTORY-OF-BINARIES     such as target/debug
#
# Needs python3 with venv, and the package registry of Python once; says so and exits with 0 where
# they are missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
binaries=$(realpath "$1")
venv=${CARGO_TARGET_DIR:-$here/../../target}/k8s-venv
skip() { echo "skip manifests: $*"; exit 0; }
command -v python3 >/dev/null || skip "python3 is not installed"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || skip "python3 is older than 3.11"
if ! "$venv/bin/python" -c 'import kubernetes_validate' 2>/dev/null; then
    python3 -m venv "$venv" || skip "python3 has no venv"
    "$venv/bin/pip" install -q --disable-pip-version-check kubernetes-validate==1.37.0 ||
        skip "kubernetes-validate cannot be installed"
fi
exec "$venv/bin/python" "$here/check.py" "$binaries"
