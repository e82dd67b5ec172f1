"""The servers under test: each exports one disk over NBD on TCP loopback.

All of them get a directory of their own on one file system. A server is a set of processes that we
started; they are ended by their ids, and the kernel ends them if this program dies.
"""

import atexit
import ctypes
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

NAME = "vol"
STOP_SECONDS = 60
READY_SECONDS = 120
TICKS = os.sysconf("SC_CLK_TCK")
PR_SET_PDEATHSIG = 1


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port, process):
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args[0]} ended with {process.returncode}; see its log")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"{process.args[0]} does not listen on port {port}")


def release_dir():
    """Where `cargo build --release` puts the binaries."""
    root = pathlib.Path(__file__).resolve().parent.parent.parent
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", root / "target")) / "release"


def load():
    """Load average of the last minute."""
    return os.getloadavg()[0]


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


class Daemon:
    """A process that left us; known by its pid file. It looks like a process of `subprocess`."""

    stdout = None
    returncode = None

    def __init__(self, command, pid_file):
        self.args = [str(word) for word in command]
        subprocess.run(self.args, check=True, timeout=60)
        deadline = time.monotonic() + READY_SECONDS
        while not (pid_file.exists() and pid_file.read_text().strip()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.args[0]} wrote no pid file")
            time.sleep(0.02)
        self.pid = int(pid_file.read_text())
        atexit.register(self.kill)

    def poll(self):
        return None if pathlib.Path(f"/proc/{self.pid}").exists() else 0

    def signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.signal(signal.SIGTERM)

    def kill(self):
        self.signal(signal.SIGKILL)

    def wait(self, seconds):
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, seconds)
            time.sleep(0.02)
        atexit.unregister(self.kill)


class Server:
    """One server. Subclasses say how to prepare a disk and which processes serve it."""

    label = ""
    durability = ""

    def __init__(self, directory, size):
        self.directory = pathlib.Path(directory)
        self.size = size
        self.processes = {}
        self.uri = ""

    def prepare(self):
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)

    def start(self):
        raise NotImplementedError

    def version(self):
        return ""

    def spawn(self, name, *command, reports=False, env=None):
        log = open(self.directory / f"{name}.log", "ab")
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stderr=log,
            stdout=subprocess.PIPE if reports else log, preexec_fn=die_with_parent,
            env={**os.environ, **(env or {})})
        log.close()
        self.processes[name] = process
        return json.loads(self.first_line(process)) if reports else process

    @staticmethod
    def first_line(process):
        """The line of JSON with which our services say that they are ready."""
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{process.args[0]} ended before it was ready; see its log")
        return line

    def stop(self):
        """Ends the processes in the order in which they were given to `stop_order`."""
        for name in self.stop_order():
            process = self.processes.pop(name)
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_SECONDS)
            if process.stdout:
                process.stdout.close()

    def stop_order(self):
        return list(reversed(self.processes))

    def evict(self):
        """Drops this server's files from the page cache, and nobody else's."""
        for path in self.directory.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def restart_cold(self):
        self.stop()
        self.evict()
        self.start()

    def cpu_seconds(self):
        """User and system time of each process since its start."""
        return {name: cpu_seconds(process.pid) for name, process in self.processes.items()}

    def forget_peaks(self):
        for process in self.processes.values():
            pathlib.Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_mib(self):
        return {name: status_kib(process.pid, "VmHWM") / 1024
                for name, process in self.processes.items()}


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def status_kib(pid, key):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {key} of process {pid}")


class Endio(Server):
    """endio as three processes."""

    durability = ("WRITE: journal commit before the reply until the connection's first FLUSH, then "
                  "a cache log in the page cache; FLUSH: data durable, on a store or in the journal. The writeback may keep "
                  "the whole disk in memory, as the page cache does for the others")
    bin_dir = release_dir()
    trace_ratio = 0.01
    # How the services reach each other. NBD clients come over TCP in any case.
    wire = "TCP"

    def __init__(self, directory, size, trace_ratio=None, stores=1, volumes=1):
        super().__init__(directory, size)
        self.stores = stores
        self.volumes = [NAME] + [f"{NAME}{number}" for number in range(1, volumes)]
        if trace_ratio is not None:
            self.trace_ratio = trace_ratio

    def version(self):
        return output("git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short",
                      "HEAD")

    def address(self, name):
        """Where a service listens: a port of its own, or a socket in the directory."""
        return "127.0.0.1:0" if self.wire == "TCP" else f"unix:{self.directory / name}.sock"

    def telemetry(self, prefix):
        ratio = str(self.trace_ratio)
        return {"RUST_LOG": "warn", f"{prefix}__telemetry__trace__ratio": ratio}

    def start(self):
        conversion = self.spawn(
            "conversion", self.bin_dir / "endio-conversion", "--data-dir",
            self.directory / "conversion", "--listen", self.address("conversion"), "--insecure",
            reports=True,
            env=self.telemetry("ENDIO_CONVERSION"))["grpc"]
        for number in range(self.stores):
            name = "block-store" if number == 0 else f"block-store-{number + 1}"
            self.spawn(
                name, self.bin_dir / "endio-block-store", "--data-dir", self.directory / name,
                "--listen", self.address(name), "--insecure", "--conversion", conversion, "--capacity",
                str(4 * self.size * len(self.volumes)), reports=True,
                env=self.telemetry("ENDIO_BLOCK_STORE"))
        ready = self.spawn(
            "writeback", self.bin_dir / "endio-writeback", "--cache-dir",
            self.directory / "cache", "--listen", self.address("writeback"), "--nbd-listen",
            "127.0.0.1:0",
            "--conversion", conversion, "--insecure", reports=True,
            env={**self.telemetry("ENDIO_WRITEBACK"), **self.read_cache()})
        self.attach(ready)

    def read_cache(self):
        """What reads are kept in, unless the caller's environment says otherwise."""
        key = "ENDIO_WRITEBACK_READ_CACHE_BYTES"
        return {key: os.environ.get(key, str(self.size * len(self.volumes) * 5 // 4))}

    def attach(self, ready):
        self.grpc = ready["grpc"]
        nbd = ready["nbd"].removeprefix("tcp:").removeprefix("nbd://")
        self.nbd = f"nbd://{nbd}/"
        self.uri = self.nbd + NAME
        deadline = time.monotonic() + READY_SECONDS
        for volume in self.volumes:
            while self.create(volume).returncode != 0:
                if time.monotonic() > deadline:
                    raise RuntimeError("the services do not take a volume; see their logs")
                time.sleep(0.05)

    def create(self, volume):
        create = [str(self.bin_dir / "endio"), "--endpoint", self.grpc, "volume", "create", volume,
                  "--size", str(self.size)]
        return subprocess.run(create, capture_output=True, timeout=60)

    def command(self, *words):
        """What `endio --json …` answers."""
        words = [str(self.bin_dir / "endio"), "--endpoint", self.grpc, "--json", *words]
        return json.loads(subprocess.run(words, capture_output=True, check=True, timeout=120).stdout)


class EndioUnix(Endio):
    """endio as three processes that speak over Unix sockets, as on one machine they may."""

    durability = Endio.durability + ". The services speak over Unix sockets"
    wire = "Unix"


class EndioUp(Endio):
    """endio as one process."""

    durability = Endio.durability.rsplit(". ", 1)[0]

    def start(self):
        ratio = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
                 "OTEL_TRACES_SAMPLER_ARG": str(self.trace_ratio), "RUST_LOG": "warn"}
        self.attach(self.spawn(
            "up", self.bin_dir / "endio", "up", "--data-dir", self.directory / "data",
            "--grpc-listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0", "--capacity",
            str(4 * self.size), reports=True, env=ratio))


class QemuNbd(Server):
    durability = "WRITE: page cache; FLUSH: fdatasync (for qcow2 its metadata first)"
    form = "qcow2"

    def prepare(self):
        super().prepare()
        subprocess.run(["qemu-img", "create", "-q", "-f", self.form, self.disk(), str(self.size)],
                       check=True, timeout=60)

    def disk(self):
        return self.directory / f"disk.{self.form}"

    def start(self):
        port = free_port()
        process = self.spawn(
            "qemu-nbd", "qemu-nbd", "--persistent", "--shared=8", f"--format={self.form}",
            "--cache=writeback", "--discard=unmap", "--bind=127.0.0.1", f"--port={port}",
            f"--export-name={NAME}", self.disk())
        wait_for_port(port, process)
        self.uri = f"nbd://127.0.0.1:{port}/{NAME}"

    def version(self):
        return output("qemu-nbd", "--version").split("\n")[0]


class QemuNbdRaw(QemuNbd):
    form = "raw"


class Nbdkit(Server):
    durability = "WRITE: page cache; FLUSH: fdatasync"

    def prepare(self):
        super().prepare()
        with open(self.directory / "disk.raw", "wb") as disk:
            disk.truncate(self.size)

    def start(self):
        port = free_port()
        process = self.spawn("nbdkit", "nbdkit", "--foreground", "--ipaddr=127.0.0.1",
                             f"--port={port}", "file", self.directory / "disk.raw")
        wait_for_port(port, process)
        self.uri = f"nbd://127.0.0.1:{port}/{NAME}"

    def version(self):
        return output("nbdkit", "--version")


class NbdServer(Nbdkit):
    durability = "WRITE: page cache; FLUSH: fsync"

    def start(self):
        port = free_port()
        config = self.directory / "config"
        config.write_text(
            f"[generic]\nlistenaddr = 127.0.0.1\nport = {port}\nmax_threads = 8\n"
            f"[{NAME}]\nexportname = {self.directory / 'disk.raw'}\nflush = true\nfua = true\n"
            "trim = true\n")
        pid_file = self.directory / "pid"
        pid_file.unlink(missing_ok=True)
        # It serves more than one client only as a daemon.
        daemon = Daemon(["nbd-server", "-p", pid_file, "-C", config], pid_file)
        self.processes["nbd-server"] = daemon
        wait_for_port(port, daemon)
        self.uri = f"nbd://127.0.0.1:{port}/{NAME}"

    def version(self):
        return "nbd-server " + output("dpkg-query", "-W", "-f", "${Version}", "nbd-server")

    def cpu_seconds(self):
        """Its parent forks one child for each connection; the time of those that ended counts."""
        return {"nbd-server": tree_seconds(self.processes["nbd-server"].pid)}


def tree_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    total = sum(int(field) for field in fields[11:15]) / TICKS
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return total + sum(tree_seconds(child) for child in children)


KINDS = {
    "endio": Endio,
    "endio-unix": EndioUnix,
    "endio-up": EndioUp,
    "endio-trace-0": lambda directory, size: Endio(directory, size, 0.0),
    "endio-trace-100": lambda directory, size: Endio(directory, size, 1.0),
    "qemu-qcow2": QemuNbd,
    "qemu-raw": QemuNbdRaw,
    "nbdkit-file": Nbdkit,
    "nbd-server": NbdServer,
}
NEEDS = {"qemu-qcow2": "qemu-nbd", "qemu-raw": "qemu-nbd", "nbdkit-file": "nbdkit",
         "nbd-server": "nbd-server"}
