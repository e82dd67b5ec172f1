#!/bin/bash
# Writes a real file to a volume while writeback is killed, reads it back, and shows the trace of a
# write. Runs in the container `demo` of docker-compose.yml; the killing is done by kill.sh.
set -euo pipefail
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*" >&2; "$@"; }
generation() { endio --json volume show demo | sed -E 's/.*"generation":([0-9]+).*/\1/'; }

say "1. A volume with two replicas, and a file: everything in /usr of this image, packed"
endio volume delete demo >/dev/null 2>&1 || true
run endio volume create demo --size 1GiB --replicas 2
# 1: a file changed meanwhile, which some storage drivers make tar believe.
tar -cf /tmp/file.tar -C / usr || [ $? -eq 1 ]
bytes=$(stat -c %s /tmp/file.tar)
ls -l /tmp/file.tar

say "2. The file is written; writeback is killed meanwhile (SIGKILL) and comes back"
run endio volume open demo >/dev/null
before=$(generation)
run endio import demo /tmp/file.tar
run endio fsync demo
after=$(generation)
echo "generation of the volume: $before, then $after"
if [ "$after" -le "$before" ]; then
    echo "nobody killed writeback: see the log of demo-kill" >&2
    exit 1
fi

say "3. It is read back, and compared"
run endio read demo --length "$bytes" > /tmp/back.tar
sha256sum /tmp/file.tar /tmp/back.tar
cmp /tmp/file.tar /tmp/back.tar

say "4. Where one write of it spent its time, over all services"
written=$(head -c 65536 /tmp/file.tar | endio --json write demo --offset 512MiB --direct --trace)
run endio trace "$(sed -E 's/.*"trace_id":"([0-9a-f]+)".*/\1/' <<<"$written")"

say "5. Every invariant, and every block against its checksum"
run endio check
say "The same bytes, although writeback died while they were written."
