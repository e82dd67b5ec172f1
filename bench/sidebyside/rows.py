"""The rows: what fio does to a disk, and what was counted."""

import json
import os
import random
import subprocess
import time

KIB = 1 << 10
MIB = 1 << 20
SPARE_SECONDS = 120


class Row:
    """One job of fio.

    before: what happens to the server before the job: "cold" restarts it with nothing of its files
    in the page cache, "warm" reads the whole disk once.
    """

    def __init__(self, name, title, *options, before="", seconds=None, block=4 * KIB, reads=False,
                 flush_first=False, flushes=False):
        self.name = name
        self.title = title
        self.options = options
        self.before = before
        self.seconds = seconds
        self.block = block
        self.reads = reads
        self.flush_first = flush_first
        self.flushes = flushes


RANDOM_WRITE = ("--rw=randwrite", "--bs=4k", "--norandommap", "--randrepeat=0")
RANDOM_READ = ("--rw=randread", "--bs=4k", "--norandommap", "--randrepeat=0")

# The first row also fills the disk for those behind it.
ROWS = [
    Row("seq-write", "sequential write 1M, depth 8, final fsync counted, thin disk", "--rw=write",
        "--bs=1M", "--iodepth=8", "--end_fsync=1", block=MIB, seconds=0),
    Row("rand-write-fsync-32", "randwrite 4k, depth 32, fsync every 32", *RANDOM_WRITE,
        "--iodepth=32", "--fsync=32", flushes=True),
    Row("rand-write-fsync-1", "randwrite 4k, depth 1, fsync each", *RANDOM_WRITE, "--iodepth=1",
        "--fsync=1", flushes=True),
    Row("rand-write", "randwrite 4k, depth 32, no fsync ever", *RANDOM_WRITE, "--iodepth=32"),
    Row("rand-write-flushed", "randwrite 4k, depth 32, one FLUSH first", "--iodepth=32",
        flush_first=True),
    Row("rand-read-cold", "randread 4k, depth 32, cold", *RANDOM_READ, "--iodepth=32",
        before="cold", reads=True),
    Row("rand-read-cached", "randread 4k, depth 32, cached", *RANDOM_READ, "--iodepth=32",
        before="warm", reads=True),
]


def fio(server, size, options, seconds):
    engine = server.engine() if hasattr(server, "engine") else \
        ["--ioengine=nbd", f"--uri={server.uri}"]
    command = ["fio", "--name=row", *engine, f"--size={size}", "--output-format=json",
               "--thread=0", *options]
    if seconds:
        command += [f"--runtime={seconds}"]
        if not any(option.startswith("--read_iolog") for option in options):
            command += ["--time_based"]
    environment = {**os.environ, **(server.config() if hasattr(server, "config") else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment,
                          cwd=server.directory, timeout=SPARE_SECONDS + 10 * (seconds or 1) + size / MIB)
    if done.returncode != 0 or "{" not in done.stdout:
        raise RuntimeError(f"fio failed: {done.stderr.strip()[-500:]} {done.stdout[-300:]}")
    job = first_json(done.stdout)["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio had error {job['error']}")
    return job


def first_json(text):
    """fio may print notes before and behind its report."""
    return json.JSONDecoder().raw_decode(text[text.index("{"):])[0]


def flush_first_log(path, size, count):
    """A log for fio to replay: one FLUSH, then writes at random places, all on one connection."""
    dice = random.Random(path.name)
    blocks = size // (4 * KIB)
    lines = ["fio version 2 iolog", "vol add", "vol open", "vol sync 0 0"]
    lines += [f"vol write {dice.randrange(blocks) * 4 * KIB} {4 * KIB}" for _ in range(count)]
    path.write_text("\n".join([*lines, "vol close\n"]))


def run(row, server, size, seconds, writes_max, at_start=lambda: None):
    """Runs the row once and returns what was counted. `at_start`: called when the server is ready."""
    if row.before == "cold":
        server.restart_cold()
    elif row.before == "warm":
        fio(server, size, ["--rw=read", "--bs=1M", "--iodepth=8"], 0)
    options = list(row.options)
    if row.flush_first:
        log = server.directory / "flush-first.log"
        if not log.exists():
            flush_first_log(log, size, writes_max)
        options += [f"--read_iolog={log}", "--bs=4k"]
    server.forget_peaks()
    at_start()
    load = os.getloadavg()[0]
    cpu = server.cpu_seconds()
    begin = time.monotonic()
    job = fio(server, size, options, row.seconds if row.seconds is not None else seconds)
    elapsed = time.monotonic() - begin
    used = {name: now - cpu[name] for name, now in server.cpu_seconds().items()}
    side = job["read" if row.reads else "write"]
    operations = max(side["total_ios"], 1)
    job_seconds = side["runtime"] / 1000
    lag = job["sync"]["lat_ns"] if row.flushes else None
    return {
        "row": row.name,
        "per_second": side["total_ios"] / max(job_seconds, 1e-3),
        "mib_per_second": side["io_bytes"] / MIB / max(job_seconds, 1e-3),
        "operations": side["total_ios"],
        "seconds": job_seconds,
        "wall_seconds": elapsed,
        "latency_us": side["lat_ns"]["mean"] / 1000,
        "p99_us": side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000,
        "fsync_us": lag["mean"] / 1000 if lag else None,
        "cpu_us": {name: 1e6 * value / operations for name, value in used.items()},
        "cpu_us_all": 1e6 * sum(used.values()) / operations,
        "peak_mib": server.peak_mib(),
        "load_before": load,
    }
