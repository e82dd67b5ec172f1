#!/bin/bash
# Prints the Secrets that the manifests want, with certificates of the development authority in DIR,
# which is made if it is not there; `endio` must be in the PATH.
#
#   k8s/pki.sh DIR | kubectl apply -n endio-dev -f -
#
# What is in DIR stays while a third of its life is left: run it again to renew, for instance monthly.
# Keep DIR as you would keep the key of a house. With cert-manager: k8s/components/cert-manager.
set -euo pipefail
dir=${1:?usage: k8s/pki.sh DIR}

secret() { # NAME DIRECTORY
    encoded() { base64 -w 0 "$1"; }
    printf -- '---\napiVersion: v1\nkind: Secret\nmetadata: {name: %s}\ntype: kubernetes.io/tls\ndata:\n' "$1"
    printf '  ca.crt: %s\n  tls.crt: %s\n  tls.key: %s\n' \
        "$(encoded "$2/ca.pem")" "$(encoded "$2/cert.pem")" "$(encoded "$2/key.pem")"
}

issue() { # SECRET, and for whom
    local secret=$1
    shift
    endio pki issue --dir "$dir" --out "$dir/$secret" --if-missing "$@" >&2
    secret "$secret" "$dir/$secret"
}

# The probe asks each service on its own loopback address.
probe=(--san localhost --san 127.0.0.1)
endio pki init --dir "$dir" --if-missing >&2
issue conversion-tls --service conversion --name conversion --san conversion "${probe[@]}"
for store in block-store-0 block-store-1 block-store-2; do
    issue "$store-tls" --service block-store --name "$store" --san "$store.block-store" "${probe[@]}"
done
issue writeback-tls --service writeback --name writeback --san endio --san writeback "${probe[@]}"
# For a pod that runs the endio command.
issue operator-tls --admin operator
