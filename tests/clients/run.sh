#!/bin/bash
# Drives an NBD server with the clients that people use.
#
#   tests/clients/run.sh HOST:PORT EXPORT CONTEXT [full]
#
# The export is writable, of 64 MiB, and its contents are lost. CONTEXT is its own metadata context.
# `full` makes the fio runs longer. A client that is not installed counts as skipped, and that is
# said. Exit code 0: everything that could be run did what it should.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
address=$1 export=$2 context=$3 length=${4:-short}
uri="nbd://$address/$export"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
# fio leaves its notes where it runs.
cd "$work" || exit 1
# The system's python has the module nbd, another one in PATH need not have it.
export PATH="/usr/bin:/bin:/usr/sbin:/sbin:$PATH"

check() { # NAME TOOL COMMAND...
    local name=$1 tool=$2
    shift 2
    if ! command -v "$tool" >/dev/null; then
        echo "skip $name: $tool is not installed (tests/clients/install.sh)"
        return
    fi
    if "$@" >"$work/out" 2>&1; then
        echo "ok   $name"
    else
        echo "FAIL $name (exit code $?)"
        sed 's/^/     /' "$work/out" | tail -30
        failed=1
    fi
}

say() { [[ $* ]] && grep -q -- "$1" <<<"$2" || { echo "no '$1' in: $2"; return 1; }; }

info() {
    local out
    out=$(nbdinfo --list "nbd://$address") || return 1
    say "export=\"$export\"" "$out" && say base:allocation "$out" && say "$context" "$out" &&
        say "can_multi_conn: true" "$out"
}

maps() { # base:allocation and the export's own context
    nbdsh -u "$uri" -c 'h.trim(h.get_size(), 0)' -c 'h.pwrite(b"x" * 65536, 1 << 20)' \
        -c 'h.flush()' || return 1
    local out
    out=$(nbdinfo --map "$uri") || return 1
    say "^ *1048576 *65536 *0 *data" "$out" && say "hole,zero" "$out" || return 1
    out=$(nbdinfo --map="$context" "$uri") && [[ $(wc -l <<<"$out") -ge 3 ]]
}

sparse_image() { # data here and there, mostly holes
    truncate -s 64M "$1"
    for at in 0 7 33; do
        dd if=/dev/urandom of="$1" bs=1M count=2 seek=$at conv=notrunc status=none
    done
    dd if=/dev/urandom of="$1" bs=1000 count=1 seek=12345 conv=notrunc status=none
}

copy() {
    sparse_image "$work/in"
    nbdcopy "$work/in" "$uri" && nbdcopy "$uri" "$work/back" && cmp "$work/in" "$work/back" &&
        [[ $(du -k "$work/back" | cut -f1) -lt 16384 ]] || return 1
    # Sparse stays sparse on the server too.
    say "hole,zero" "$(nbdinfo --map "$uri")"
}

qemu_img() {
    sparse_image "$work/q"
    qemu-img info "$uri" && qemu-img convert -n -f raw -O raw "$work/q" "$uri" &&
        qemu-img compare -f raw -F raw "$work/q" "$uri" &&
        qemu-img convert -f raw -O qcow2 "$uri" "$work/q.qcow2" &&
        qemu-img compare -f raw -F qcow2 "$work/q" "$work/q.qcow2" &&
        say '"zero": true' "$(qemu-img map --output=json "$uri")"
}

qemu_patterns() {
    qemu-io -f raw -t writeback \
        -c 'write -P 17 0 64k' -c 'write -P 18 4095 2' -c 'write -f -P 19 1M 3M' \
        -c 'read -P 17 0 4095' -c 'read -P 18 4095 2' -c 'read -P 17 4097 61439' \
        -c 'read -P 19 1M 3M' -c 'write -z 1M 1M' -c 'read -P 0 1M 1M' \
        -c 'write -z -u 2M 4k' -c 'read -P 0 2M 4k' -c 'discard 3M 1M' -c 'read -P 0 3M 1M' \
        -c 'aio_write -P 20 8M 1M' -c 'aio_write -P 21 9M 1M' -c 'aio_flush' -c flush \
        -c 'read -P 20 8M 1M' -c 'read -P 21 9M 1M' -c 'map' "$uri" | tee "$work/io" || return 1
    ! grep -iE 'failed|error|mismatch' "$work/io"
}

verify() { # fio arguments
    fio --ioengine=nbd --uri="$uri" --verify=crc32c --do_verify=1 --verify_fatal=1 \
        --group_reporting "$@"
}

case $length in
full) size=48M jobsize=12M ;;
*) size=4M jobsize=2M ;;
esac

check "nbdinfo lists the export with its contexts" nbdinfo info
check "nbdinfo maps both contexts" nbdsh maps
check "nbdsh uses every command and flag" nbdsh \
    env URI="$uri" CONTEXT="$context" nbdsh -c "exec(open('$here/commands.py').read())"
check "nbdcopy copies both ways and keeps holes" nbdcopy copy
check "qemu-img converts, compares and maps" qemu-img qemu_img
check "qemu-io finds its patterns" qemu-io qemu_patterns
check "fio verifies sequential writes" fio \
    verify --name=seq --rw=write --bs=64k --size=$size --iodepth=8 --end_fsync=1
check "fio verifies random writes with fsync" fio \
    verify --name=rand --rw=randwrite --bs=4k --size=$size --iodepth=16 --fsync=32
check "fio verifies mixed sizes, unaligned" fio \
    verify --name=mixed --rw=randrw --bsrange=512-64k --bs_unaligned=1 --size=$size --iodepth=8
check "fio verifies four jobs on four connections" fio \
    verify --name=jobs --numjobs=4 --rw=randwrite --bs=8k --size=$jobsize \
    --offset_increment=16M --iodepth=8 --fsync=16
exit $failed
