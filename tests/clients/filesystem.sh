#!/bin/bash
# A real file system on an endio volume, while endio is killed and comes back.
#
#   tests/clients/filesystem.sh PATH-OF-endio [KILLS]
#
#   ext4 ─ loop device ─ nbdfuse ─ nbdkit (retries) ─ NBD ─ endio up (SIGKILL, again and again)
#
# Needs root, /dev/fuse and loop devices; where something is missing it says so and exits with 0.
set -uo pipefail
endio=$(realpath "$1") kills=${2:-2}
export PATH="/usr/bin:/bin:/usr/sbin:/sbin:$PATH"
skip() { echo "skip file system: $*"; exit 0; }
for tool in nbdkit nbdfuse nbdsh mkfs.ext4 e2fsck losetup; do
    command -v $tool >/dev/null || skip "$tool is not installed (tests/clients/install.sh)"
done
[[ $(id -u) == 0 ]] || skip "not root"
[[ -c /dev/fuse ]] || skip "no /dev/fuse"
losetup -f >/dev/null 2>&1 || skip "no loop devices"

work=$(mktemp -d) loop='' up='' kit='' fuse=''
# The same ports again after each kill.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
grpc=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

start() {
    : >"$work/up.out"
    "$endio" up --data-dir "$work/data" --grpc-listen "127.0.0.1:$grpc" \
        --nbd-listen "127.0.0.1:$port" >"$work/up.out" 2>>"$work/up.err" &
    up=$!
    for _ in $(seq 300); do
        grep -q '"ready"' "$work/up.out" && return 0
        sleep 0.1
    done
    echo "FAIL endio does not become ready"
    return 1
}

clean() {
    mountpoint -q "$work/mnt" && umount -l "$work/mnt"
    [[ $loop ]] && losetup -d "$loop"
    mountpoint -q "$work/fuse" && fusermount3 -uz "$work/fuse" 2>/dev/null
    for pid in $fuse $kit $up; do kill "$pid" 2>/dev/null; done
    wait 2>/dev/null
    rm -rf "$work"
}
trap clean EXIT
fail() { echo "FAIL file system: $*"; tail -20 "$work/up.err" "$work/kit.err"; exit 1; }

hashes() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }

start || exit 1
"$endio" --endpoint "http://127.0.0.1:$grpc" volume create fs --size 2GiB >/dev/null ||
    fail "no volume"
nbdkit -f -U "$work/kit.sock" --filter=retry nbd "uri=nbd://127.0.0.1:$port/fs" \
    retries=60 retry-delay=1 retry-exponential=no 2>"$work/kit.err" &
kit=$!
for _ in $(seq 50); do [[ -S $work/kit.sock ]] && break; sleep 0.1; done
mkdir "$work/fuse" "$work/mnt" "$work/tree"
nbdfuse "$work/fuse/disk" --unix "$work/kit.sock" 2>>"$work/kit.err" &
fuse=$!
for _ in $(seq 50); do [[ -f $work/fuse/disk ]] && break; sleep 0.1; done
[[ -f $work/fuse/disk ]] || skip "nbdfuse cannot mount here: $(tail -1 "$work/kit.err")"
loop=$(losetup -f --show "$work/fuse/disk" 2>"$work/loop.err") ||
    skip "no loop device can be set up: $(cat "$work/loop.err")"
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$loop" || fail "mkfs.ext4"
mount "$loop" "$work/mnt" || fail "mount"

# Real work: a tree is copied in while endio is killed, then packed and unpacked on the volume.
cp -a /usr/include "$work/tree/include" 2>/dev/null
cp -a /usr/share/perl* "$work/tree/" 2>/dev/null
(
    cp -a "$work/tree" "$work/mnt/one" && sync -f "$work/mnt" &&
        tar -C "$work/mnt" -cf "$work/mnt/one.tar" one && mkdir "$work/mnt/two" &&
        tar -C "$work/mnt/two" -xf "$work/mnt/one.tar" && sync -f "$work/mnt"
) 2>"$work/work.err" &
job=$!
for round in $(seq "$kills"); do
    sleep 1
    kill -0 $job 2>/dev/null || echo "     (the work was done before kill $round)"
    kill -KILL "$up"
    wait "$up" 2>/dev/null
    start || exit 1
done
wait $job || fail "the work failed: $(cat "$work/work.err")"
umount "$work/mnt" || fail "umount"
e2fsck -fn "$loop" >"$work/fsck" 2>&1 || fail "e2fsck: $(cat "$work/fsck")"
losetup -d "$loop" && loop=$(losetup -f --show "$work/fuse/disk")
mount -o ro "$loop" "$work/mnt" || fail "mount again"
hashes "$work/tree" >"$work/want"
for copy in one two/one; do
    hashes "$work/mnt/$copy" | cmp - "$work/want" || fail "$copy has other contents"
done
umount "$work/mnt"
echo "ok   ext4: $(wc -l <"$work/want") files twice, $kills kills, e2fsck clean"
