#!/bin/bash
# Starts endio and drives a volume of it with the clients that people use (run.sh), and full-size
# changes of a 2 TiB volume.
#
#   tests/clients/endio.sh PATH-OF-endio [full]
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
endio=$(realpath "$1") length=${2:-short}
work=$(mktemp -d) up='' failed=0
clean() {
    [[ $up ]] && kill "$up" && wait "$up" 2>/dev/null
    rm -rf "$work"
}
trap clean EXIT
: >"$work/out"
"$endio" up --data-dir "$work/data" --grpc-listen 127.0.0.1:0 --nbd-listen 127.0.0.1:0 \
    >"$work/out" 2>"$work/err" &
up=$!
for _ in $(seq 300); do
    grep -q '"ready"' "$work/out" && break
    sleep 0.1
done
field() { sed -E "s/.*\"$1\":\"([^\"]*)\".*/\1/" "$work/out"; }
grpc=$(field grpc) nbd=$(field nbd)
[[ $nbd ]] || { echo "FAIL endio does not become ready"; cat "$work/err"; exit 1; }

"$endio" --endpoint "$grpc" volume create disk --size 64MiB >/dev/null || failed=1
"$here/run.sh" "$nbd" disk endio:state "$length" || failed=1

# What `endio attach` says is run as it stands, as far as the programs are there.
"$endio" --endpoint "$grpc" attach disk >"$work/attach" || failed=1
truncate -s 64M "$work/disk.img"
for program in nbdinfo qemu-img fio; do
    line=$(grep "^$program" "$work/attach" | tail -1)
    command -v $program >/dev/null || { echo "skip attach: $program is not installed"; continue; }
    if (cd "$work" && eval "${line/--size=64m/--size=2m}" >"$work/line" 2>&1); then
        echo "ok   $line"
    else
        echo "FAIL $line: $(tail -5 "$work/line")"
        failed=1
    fi
done
# A machine starts from the volume: its boot sector says so on the serial line, and halts.
if command -v qemu-system-x86_64 >/dev/null && command -v qemu-io >/dev/null; then
    {
        printf '\xfa\x31\xc0\x8e\xd8\xbe\x1e\x7c\xba\xf8\x03\xac\x08\xc0\x74\x03\xee'
        printf '\xeb\xf8\xf4\xeb\xfd%-8sFROM ENDIO\r\n' ''
        head -c 468 /dev/zero
        printf '\x55\xaa'
    } >"$work/boot"
    qemu-img convert -n -f raw -O raw "$work/boot" "nbd://$nbd/disk" || failed=1
    : >"$work/serial"
    line=$(grep "^qemu-system" "$work/attach")
    # shellcheck disable=SC2086 # the line is words
    $line -display none -m 64 -serial "file:$work/serial" 2>"$work/machine" &
    machine=$!
    for _ in $(seq 600); do
        grep -q "FROM ENDIO" "$work/serial" && break
        kill -0 $machine 2>/dev/null || break
        sleep 0.1
    done
    kill $machine 2>/dev/null
    wait $machine 2>/dev/null
    if grep -q "FROM ENDIO" "$work/serial"; then
        echo "ok   $line"
    else
        echo "FAIL $line: $(cat "$work/machine")"
        failed=1
    fi
else
    echo "skip a machine: qemu-system-x86_64 is not installed"
fi

"$endio" --endpoint "$grpc" volume create big --size 2TiB >/dev/null || failed=1
export PATH="/usr/bin:/bin:$PATH"
if command -v nbdsh >/dev/null; then
    # Trims and zeroings of a whole volume free its space and take about a second.
    cat >"$work/big.py" <<'P'
import subprocess, sys, time
STEP = (1 << 32) - (1 << 20)
size = h.get_size()
assert size == 2 << 40
def used():
    return int(subprocess.check_output(["du", "-sk", DATA]).split()[0])
def whole(change):
    begun = time.time()
    for offset in range(0, size, STEP):
        change(min(STEP, size - offset), offset)
    return time.time() - begun
for name, change in (("trim", h.trim), ("zero", h.zero)):
    for at in range(16):
        h.pwrite(bytes([at + 1]) * (1 << 20), at << 36)
    h.flush()
    full = used()
    seconds = whole(change)
    h.flush()
    assert not any(h.pread(1 << 20, 15 << 36))
    for _ in range(100):
        if used() <= full - 15 * 1024:
            break
        time.sleep(0.1)
    assert used() <= full - 15 * 1024, (full, used())
    print(f"ok   {name} of 2 TiB: {seconds:.2f} s, {full - used()} KiB given back", flush=True)
P
    # A client that never flushes has no cache before it; one that has flushed has.
    cat >"$work/cache.py" <<'P'
import errno, subprocess
HOLE, DELAYED, UNWRITTEN, WRITTEN, IN_FLIGHT = range(5)
def state(c, at):
    found = []
    c.block_status(4096, at, lambda name, o, entries, e: found.extend(entries))
    return found[1]
def client(how=""):
    c = nbd.NBD()
    c.add_meta_context("endio:state")
    c.connect_uri(URI + how)
    return c
a, b = client(), client()
# More than conversion's data log takes: it is written when the request is answered.
LARGE = 512 << 10
a.trim(1 << 20, 0)
a.pwrite(b"1" * LARGE, 0)
assert state(a, 0) == WRITTEN
a.flush()
a.pwrite(b"2" * 4096, LARGE)
assert state(a, LARGE) in (DELAYED, IN_FLIGHT), state(a, LARGE)
a.pwrite(b"3" * LARGE, 4 * LARGE, nbd.CMD_FLAG_FUA)
assert state(a, 4 * LARGE) == WRITTEN
b.pwrite(b"4" * LARGE, 8 * LARGE)
assert state(b, 8 * LARGE) == WRITTEN
# What is small is durable in the data log, and written out later.
a.pwrite(b"6" * 4096, 12 * LARGE, nbd.CMD_FLAG_FUA)
assert state(a, 12 * LARGE) in (DELAYED, IN_FLIGHT, WRITTEN), state(a, 12 * LARGE)
# b sees what a wrote, and its flush covers it.
assert b.pread(4096, LARGE) == b"2" * 4096
# More than a flush sends to the data log, in writes that the cache takes.
for at in range(8):
    a.pwrite(b"5" * (LARGE >> 3), 16 * LARGE + at * (LARGE >> 3))
b.flush()
assert state(a, LARGE) == WRITTEN and state(a, 16 * LARGE) == WRITTEN
# What is large goes straight to the stores, also behind a flush.
a.pwrite(b"7" * LARGE, 20 * LARGE)
assert state(a, 20 * LARGE) == WRITTEN
a.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)
a.trim(4096, 4096)
assert state(a, 0) == UNWRITTEN and state(a, 4096) == HOLE
# A direct write is in flight until it has been converted.
seen = set()
for at in range(64):
    buffer = nbd.Buffer.from_bytearray(bytearray(1 << 20))
    cookie = b.aio_pwrite(buffer, 32 << 20, flags=nbd.CMD_FLAG_FUA)
    while not b.aio_command_completed(cookie):
        found = []
        b.block_status(4096, 32 << 20, lambda name, o, entries, e: found.extend(entries))
        seen.add(found[1])
    if IN_FLIGHT in seen:
        break
assert IN_FLIGHT in seen and seen <= {HOLE, IN_FLIGHT, WRITTEN}, seen
# CACHE takes ranges of any length, also beyond what it reads.
b.cache(60 << 20, 0)
# Read-only: nothing changes, under libnbd's checks and without them.
ro = client("@ro")
assert ro.is_read_only() and ro.pread(4, 4 * LARGE) == b"3333"
ro.set_strict_mode(0)
for change in (lambda: ro.pwrite(b"x", 4 * LARGE), lambda: ro.trim(4096, 4 * LARGE),
               lambda: ro.zero(1, 4 * LARGE)):
    try:
        change()
    except nbd.Error as error:
        assert error.errnum == errno.EPERM, error
    else:
        raise AssertionError("a read-only export was changed")
assert b.pread(4, 4 * LARGE) == b"3333"
# Single: the next connection takes the place of the one before, and of no other.
one = client("@single")
assert not one.can_multi_conn()
one.pwrite(b"one", 20480)
two = client("@single")
assert two.pread(3, 20480) == b"one"
try:
    one.pwrite(b"late", 20480)
except nbd.Error:
    pass
else:
    raise AssertionError("a connection that was replaced still writes")
assert two.pread(3, 20480) == b"one" and b.pread(3, 20480) == b"one"
# A volume that grows: who connects again is told, who stays goes on as before.
old = a.get_size()
subprocess.check_call([ENDIO, "--endpoint", GRPC, "volume", "resize", "disk", "--size", "80MiB"],
                      stdout=subprocess.DEVNULL)
new = client()
assert (a.get_size(), new.get_size()) == (old, 80 << 20)
new.pwrite(b"new", old)
assert new.pread(3, old) == b"new" and a.pread(4, 4 * LARGE) == b"3333"
print("ok   read-only, single, in flight, cache, a new size after reconnecting", flush=True)
print("ok   write-through until the first FLUSH, which covers all connections", flush=True)
P
    nbdsh -c "URI = 'nbd://$nbd/disk'; ENDIO = '$endio'; GRPC = '$grpc'; exec(open('$work/cache.py').read())" || failed=1
    nbdsh -u "nbd://$nbd/big" -c "DATA = '$work/data'; exec(open('$work/big.py').read())" ||
        failed=1
else
    echo "skip changes of 2 TiB: nbdsh is not installed (tests/clients/install.sh)"
fi
exit $failed
