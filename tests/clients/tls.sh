#!/bin/bash
# Volumes over TLS: who gets in, where TLS is required and where it is optional, and which
# certificate opens which volume.
#
#   tests/clients/tls.sh PATH-OF-endio
set -uo pipefail
endio=$(realpath "$1")
export PATH="/usr/bin:/bin:$PATH"
for tool in nbdinfo nbdsh certtool; do
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
mkdir "$work/bob" && cp "$work/own"/ca-* "$work/bob" && issue "$work/bob" client bob
authority "$work/other" && issue "$work/other" client alice
cp "$work/own/ca-cert.pem" "$work/other/ca-cert.pem"
mkdir "$work/nameless" && cp "$work/own/ca-cert.pem" "$work/nameless/"

field() { sed -E "s/.*\"$1\":\"([^\"]*)\".*/\1/" "$work/out"; }
start() { # FLAGS...
    : >"$work/out"
    "$endio" up --data-dir "$work/data" --grpc-listen 127.0.0.1:0 --nbd-listen 127.0.0.1:0 \
        --nbd-tls "$work/own" "$@" >"$work/out" 2>"$work/err" &
    up=$!
    for _ in $(seq 300); do
        grep -q '"ready"' "$work/out" && break
        sleep 0.1
    done
    grpc=$(field grpc) nbd=$(field nbd)
    [[ $nbd ]] || { echo "FAIL endio does not become ready"; cat "$work/err"; exit 1; }
}
stop() { kill "$up" && wait "$up" 2>/dev/null; up=''; }
at() { # EXPORT CLIENT
    echo "nbds://localhost:${nbd##*:}/$1?tls-certificates=$work/$2"
}
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
changes() { # URI: whether the client can change the volume
    timeout 30 nbdsh -c 'h.set_uri_allow_local_file(True)' -c "h.connect_uri('$1')" \
        -c 'h.set_strict_mode(0)' -c 'h.pwrite(b"x" * 4096, 0)' >"$work/info" 2>&1
}
check() { # NAME COMMAND...
    local name=$1
    shift
    if "$@"; then echo "ok   TLS: $name"; else echo "FAIL TLS: $name: $(cat "$work/info")"; failed=1; fi
}

start
for volume in vol other; do
    "$endio" --endpoint "$grpc" volume create $volume --size 16MiB >/dev/null || exit 1
done
plain="nbd://localhost:${nbd##*:}"
expect in "a client with a certificate gets in" "$(at vol own)"
expect out "a client of another authority is refused" "$(at vol other)"
expect out "a client without a certificate is refused" "$(at vol nameless)"
expect out "a client without TLS is refused" "$plain/vol"
check "endio attach says so" \
    grep -q "nbds://$nbd/vol" <("$endio" --endpoint "$grpc" attach vol --tls-certificates /pki)
stop

start --nbd-allow 'alice=vol,other@ro' --nbd-allow 'bob=other'
expect in "a certificate opens its volume" "$(at vol own)"
expect in "another certificate opens its own" "$(at other bob)"
expect out "and not one that is not its own" "$(at vol bob)"
check "a certificate for reading reads" timeout 30 nbdinfo --is readonly "$(at other own)"
check "and changes nothing" eval "! changes '$(at other own)' && changes '$(at vol own)'"
timeout 30 nbdinfo --list "nbds://localhost:${nbd##*:}/?tls-certificates=$work/bob" >"$work/info" 2>&1
check "the list shows what a certificate opens" \
    eval "grep -q 'export=\"other\"' '$work/info' && ! grep -q 'export=\"vol\"' '$work/info'"
stop

start --nbd-tls-optional
plain="nbd://localhost:${nbd##*:}"
expect in "where it is optional, a client with TLS gets in" "$(at vol own)"
expect in "and one without" "$plain/vol"
expect out "and none with a certificate of another authority" "$(at vol other)"
stop

start --nbd-tls-optional --nbd-allow 'alice=vol'
plain="nbd://localhost:${nbd##*:}"
expect in "a volume that is somebody's is opened with a certificate" "$(at vol own)"
expect out "and not without, although TLS is optional" "$plain/vol"
exit $failed
