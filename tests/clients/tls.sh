#!/bin/bash
# A volume over TLS: a client with a certificate of the authority gets in, others do not.
#
#   tests/clients/tls.sh PATH-OF-endio
set -uo pipefail
endio=$(realpath "$1")
export PATH="/usr/bin:/bin:$PATH"
for tool in nbdinfo certtool; do
    command -v $tool >/dev/null ||
        { echo "skip TLS: $tool is not installed (tests/clients/install.sh)"; exit 0; }
done
work=$(mktemp -d) up='' failed=0
clean() {
    [[ $up ]] && kill "$up" && wait "$up" 2>/dev/null
    rm -rf "$work"
}
trap clean EXIT
authority() { # DIRECTORY
    mkdir -p "$1"
    certtool --generate-privkey --outfile "$1/ca-key.pem" 2>/dev/null
    printf 'cn = "authority"\nca\ncert_signing_key\n' >"$1/ca.info"
    certtool --generate-self-signed --load-privkey "$1/ca-key.pem" --template "$1/ca.info" \
        --outfile "$1/ca-cert.pem" 2>/dev/null
}
issue() { # DIRECTORY KIND NAME
    certtool --generate-privkey --outfile "$1/$2-key.pem" 2>/dev/null
    printf 'cn = "%s"\ndns_name = "localhost"\nsigning_key\nencryption_key\n' "$3" >"$1/$2.info"
    [[ $2 == server ]] && echo tls_www_server >>"$1/$2.info" || echo tls_www_client >>"$1/$2.info"
    certtool --generate-certificate --load-ca-certificate "$1/ca-cert.pem" \
        --load-ca-privkey "$1/ca-key.pem" --load-privkey "$1/$2-key.pem" \
        --template "$1/$2.info" --outfile "$1/$2-cert.pem" 2>/dev/null
}
authority "$work/own" && issue "$work/own" server localhost && issue "$work/own" client alice
authority "$work/other" && issue "$work/other" client alice
cp "$work/own/ca-cert.pem" "$work/other/ca-cert.pem"
mkdir "$work/nameless" && cp "$work/own/ca-cert.pem" "$work/nameless/"

: >"$work/out"
"$endio" up --data-dir "$work/data" --grpc-listen 127.0.0.1:0 --nbd-listen 127.0.0.1:0 \
    --nbd-tls "$work/own" >"$work/out" 2>"$work/err" &
up=$!
for _ in $(seq 300); do
    grep -q '"ready"' "$work/out" && break
    sleep 0.1
done
field() { sed -E "s/.*\"$1\":\"([^\"]*)\".*/\1/" "$work/out"; }
grpc=$(field grpc) nbd=$(field nbd)
"$endio" --endpoint "$grpc" volume create vol --size 16MiB >/dev/null || exit 1
expect() { # OUTCOME NAME URI
    timeout 30 nbdinfo "$3" >"$work/info" 2>&1
    local code=$?
    if [[ ($1 == in && $code == 0) || ($1 == out && $code != 0 && $code != 124) ]]; then
        echo "ok   TLS: $2"
    else
        echo "FAIL TLS: $2 (exit code $code): $(cat "$work/info")"
        failed=1
    fi
}
tls="nbds://localhost:${nbd##*:}/vol?tls-certificates=$work"
expect in "a client with a certificate gets in" "$tls/own"
expect out "a client of another authority is refused" "$tls/other"
expect out "a client without a certificate is refused" "$tls/nameless"
expect out "a client without TLS is refused" "nbd://localhost:${nbd##*:}/vol"
exit $failed
