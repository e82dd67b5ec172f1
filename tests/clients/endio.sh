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
HOLE, DELAYED, UNWRITTEN, WRITTEN, IN_FLIGHT = range(5)
def state(c, at):
    found = []
    c.block_status(4096, at, lambda name, o, entries, e: found.extend(entries))
    return found[1]
def client():
    c = nbd.NBD()
    c.add_meta_context("endio:state")
    c.connect_uri(URI)
    return c
a, b = client(), client()
a.trim(1 << 20, 0)
a.pwrite(b"1" * 4096, 0)
assert state(a, 0) == WRITTEN
a.flush()
a.pwrite(b"2" * 4096, 4096)
assert state(a, 4096) in (DELAYED, IN_FLIGHT), state(a, 4096)
a.pwrite(b"3" * 4096, 8192, nbd.CMD_FLAG_FUA)
assert state(a, 8192) == WRITTEN
b.pwrite(b"4" * 4096, 12288)
assert state(b, 12288) == WRITTEN
# b sees what a wrote, and its flush covers it.
assert b.pread(4096, 4096) == b"2" * 4096
a.pwrite(b"5" * 4096, 16384)
b.flush()
assert state(a, 4096) == WRITTEN and state(a, 16384) == WRITTEN
a.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)
a.trim(4096, 4096)
assert state(a, 0) == UNWRITTEN and state(a, 4096) == HOLE
print("ok   write-through until the first FLUSH, which covers all connections", flush=True)
P
    nbdsh -c "URI = 'nbd://$nbd/disk'; exec(open('$work/cache.py').read())" || failed=1
    nbdsh -u "nbd://$nbd/big" -c "DATA = '$work/data'; exec(open('$work/big.py').read())" ||
        failed=1
else
    echo "skip changes of 2 TiB: nbdsh is not installed (tests/clients/install.sh)"
fi
exit $failed
