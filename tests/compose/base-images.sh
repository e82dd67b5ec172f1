#!/bin/bash
# Sees to it that the base images of the Dockerfile are there: those of the registry where one can
# be reached, else stand-ins of the same names, made from Debian packages and this machine's Rust.
# What is there already is left as it is.
#
#   tests/compose/base-images.sh [--no-pull]
#
# Stand-ins carry the label endio.stand-in. They need root (sudo) and mmdebstrap, which is installed
# if it is not there.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi; }

# The names are those of the Dockerfile and nowhere else.
default_of() { sed -n "s/^ARG $1=//p" "$root/Dockerfile"; }
runtime=$(default_of RUNTIME_IMAGE)
rust=$(default_of RUST_IMAGE)
suite=bookworm

missing=()
for image in "$runtime" "$rust"; do
    if docker image inspect "$image" >/dev/null 2>&1; then
        echo "there: $image"
    elif [ "${1:-}" != --no-pull ] && timeout 300 docker pull -q "$image" 2>/dev/null; then
        echo "pulled: $image"
    else
        missing+=("$image")
    fi
done
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v mmdebstrap >/dev/null; then
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends mmdebstrap
fi
work=$(mktemp -d)
trap 'as_root rm -rf "$work"' EXIT
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

# As the official images: no documentation; for Rust gcc, what it needs, and a toolchain. Besides, the
# authorities that this machine trusts: its way to the package registry may need them.
debian() { # TAR PACKAGES HOOKS
    local tar=$1 packages=$2
    shift 2
    as_root mmdebstrap --quiet --variant=minbase --include="$packages" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*' \
        "$@" "$suite" "$tar" "$mirror"
}

for image in "${missing[@]}"; do
    begun=$SECONDS
    changes=(--change "LABEL endio.stand-in=$image" --change 'CMD ["bash"]')
    if [ "$image" = "$runtime" ]; then
        debian "$work/image.tar" tzdata
    else
        sysroot=$(rustc --print sysroot)
        host=$(rustc -vV | sed -n 's/^host: //p')
        hooks=(--customize-hook="cd '$sysroot' && tar -cf - bin/cargo bin/rustc lib/*.so* \
            lib/rustlib/$host | tar -xf - --no-same-owner -C \"\$1/usr/local\"")
        authorities=/etc/ssl/certs/ca-certificates.crt
        if [ -f $authorities ]; then
            hooks+=(--customize-hook="upload $authorities $authorities")
        fi
        debian "$work/image.tar" ca-certificates,gcc,libc6-dev "${hooks[@]}"
        changes+=(--change 'ENV CARGO_HOME=/usr/local/cargo')
    fi
    as_root cat "$work/image.tar" | docker import "${changes[@]}" - "$image" >/dev/null
    echo "stand-in: $image ($((SECONDS - begun)) s)"
    as_root rm -f "$work/image.tar"
done
