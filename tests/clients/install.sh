#!/bin/sh
# Installs the NBD clients that tests/clients/run.sh drives. Debian or Ubuntu, as root.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends \
    libnbd-bin python3-libnbd qemu-utils fio nbdkit gnutls-bin e2fsprogs xfsprogs btrfs-progs
# nbdfuse has a package of its own in some releases and is part of libnbd-bin in others.
command -v nbdfuse >/dev/null || apt-get install -y --no-install-recommends nbdfuse
