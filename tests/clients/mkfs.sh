#!/bin/bash
# Makes file systems on a volume of 2 TiB, and discards them again.
#
#   tests/clients/mkfs.sh PATH-OF-endio
#
# Needs root, /dev/fuse and loop devices; where something is missing it says so and exits with 0.
set -uo pipefail
endio=$(realpath "$1")
export PATH="/usr/bin:/bin:/usr/sbin:/sbin:$PATH"
skip() { echo "skip mkfs: $*"; exit 0; }
for tool in nbdfuse losetup blkdiscard; do
    command -v $tool >/dev/null || skip "$tool is not installed (tests/clients/install.sh)"
done
[[ $(id -u) == 0 ]] || skip "not root"
[[ -c /dev/fuse ]] || skip "no /dev/fuse"
losetup -f >/dev/null 2>&1 || skip "no loop devices"

work=$(mktemp -d) loop='' up='' fuse='' failed=0
clean() {
    [[ $loop ]] && losetup -d "$loop"
    mountpoint -q "$work/fuse" && umount -l "$work/fuse"
    for pid in $fuse $up; do kill "$pid" 2>/dev/null; done
    wait 2>/dev/null
    rm -rf "$work"
}
trap clean EXIT
: >"$work/out"
"$endio" up --data-dir "$work/data" --grpc-listen 127.0.0.1:0 \
    --nbd-listen "unix:$work/nbd.sock" >"$work/out" 2>"$work/err" &
up=$!
for _ in $(seq 300); do
    grep -q '"ready"' "$work/out" && break
    sleep 0.1
done
grpc=$(sed -E 's/.*"grpc":"([^"]*)".*/\1/' "$work/out")
"$endio" --endpoint "$grpc" volume create big --size 2TiB >/dev/null || exit 1
mkdir "$work/fuse"
nbdfuse "$work/fuse/disk" "nbd+unix:///big?socket=$work/nbd.sock" 2>"$work/fuse.err" &
fuse=$!
for _ in $(seq 50); do [[ -f $work/fuse/disk ]] && break; sleep 0.1; done
[[ -f $work/fuse/disk ]] || skip "nbdfuse cannot mount here: $(tail -1 "$work/fuse.err")"
loop=$(losetup -f --show "$work/fuse/disk" 2>"$work/loop.err") ||
    skip "no loop device can be set up: $(cat "$work/loop.err")"

used() {
    "$endio" --endpoint "$grpc" --json volume show big | sed -E 's/.*"mapped_blocks": ?([0-9]+).*/\1/;t;d'
}
for fs in "ext4 -q -F" "xfs -q -f" "btrfs -q -f"; do
    kind=${fs%% *}
    command -v "mkfs.$kind" >/dev/null || { echo "skip mkfs.$kind: not installed"; continue; }
    begun=$EPOCHREALTIME
    # shellcheck disable=SC2086 # the options are words
    if ! timeout 200 mkfs.$fs "$loop" 2>"$work/mkfs.err"; then
        echo "FAIL mkfs.$kind: $(cat "$work/mkfs.err")"
        failed=1
        continue
    fi
    sync
    took=$(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $begun }")
    found=$(blkid -p -o value -s TYPE "$loop")
    held=$(used)
    blkdiscard -f "$loop" 2>/dev/null
    left=$(used)
    if [[ $found == "$kind" && $held -gt 0 && $left == 0 ]]; then
        echo "ok   mkfs.$kind on 2 TiB: $took s, $held blocks used, none after a discard"
    else
        echo "FAIL mkfs.$kind: type '$found', $held blocks used, $left after a discard"
        failed=1
    fi
done
exit $failed
