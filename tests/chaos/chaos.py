"""Breaks containers under load and checks that nothing acknowledged is lost.

    tests/chaos/run.sh SCENARIO… | all | short | list

Each scenario has a stack of its own. Writers over NBD keep a ledger (ledger.py), an import over gRPC
runs beside them; then something is broken and mended, and work must go on. At the end everything is
read back and compared, and `endio check` must be clean. What was done when, what was checked, and
figures go to a report.
"""

import datetime
import hashlib
import json
import os
import pathlib
import random
import ssl
import sys
import tempfile
import threading
import time

import nbd

from ledger import Ledger
from stack import ROOT, SERVICES, TLS_DIR, Stack, compose_command, free_port

# Longer than a lease (limits.lease_ms, 5 s by default).
BEYOND_THE_LEASE_S = 7
# Longer than services take to look at their certificates again (tls.reload_every_ms, 2 s).
BEYOND_A_RELOAD_S = 4
# Time in which work must go on after the fault is gone; generous, machines are slow.
PATIENCE_S = 180
IMPORT_BYTES = 24 << 20
STORES = ["block-store-1", "block-store-2"]


class Scene:
    """A stack under load, and the notes about it."""

    def __init__(self, name, image, seed, files=("docker-compose.yml",)):
        self.name, self.seed = name, seed
        self.stack = Stack(f"endio-{name}-{os.getpid()}", image, files)
        self.random = random.Random(seed)
        self.notes = []
        self.figures = {}

    def note(self, text):
        self.notes.append((time.time(), text))
        print(f"     {datetime.datetime.now():%H:%M:%S} {text}", flush=True)

    def begin(self, replicas=2):
        self.stack.up()
        self.note("up: " + ", ".join(SERVICES))
        for volume, size in (("ledger", Ledger.bytes()), ("image", IMPORT_BYTES)):
            self.stack.endio("volume", "create", volume, "--size", str(size),
                             "--replicas", str(replicas))
        self.ledger = Ledger(self.stack.uri("ledger"), self.seed, patience=PATIENCE_S)
        self.ledger.start()
        self.image = random.Random(self.seed).randbytes(IMPORT_BYTES)
        self.imported = None
        self.importer = threading.Thread(target=self.write_image, daemon=True)
        self.importer.start()
        self.ledger.progress(5, PATIENCE_S)
        self.note("writers over NBD and a writer over gRPC are at work")

    def write_image(self):
        try:
            self.stack.endio("write", "image", "--patience", f"{PATIENCE_S}s", stdin=self.image)
            self.imported = True
        except Exception as error:  # told where it is waited for
            self.imported = error

    def going_on(self, more=10):
        begun = time.monotonic()
        self.ledger.progress(more, PATIENCE_S)
        took = time.monotonic() - begun
        self.note(f"each writer got {more} acknowledgements in {took:.1f} s")

    def verify(self, what):
        cells = self.ledger.verify()
        self.note(f"{what}: {cells} cells are as acknowledged")

    def end(self):
        """Stops the load and checks everything."""
        self.importer.join(PATIENCE_S + 60)
        assert self.imported is True, f"the writer over gRPC: {self.imported}"
        self.ledger.stop()
        self.verify("read back over NBD")
        back = self.stack.endio("read", "image", "--length", str(IMPORT_BYTES))
        assert hashlib.sha256(back).digest() == hashlib.sha256(self.image).digest(), \
            "what the writer over gRPC wrote reads otherwise"
        self.note(f"read back over gRPC: {IMPORT_BYTES >> 20} MiB are the same")
        self.stack.endio("sync")
        blocks = self.stack.check()
        self.note(f"endio check: clean, {blocks} blocks compared with their checksums")
        panics = self.stack.panics()
        assert not panics, panics
        self.figures = self.ledger.figures() | {"blocks verified": blocks}

    def no_error_told(self):
        """While writeback lives, no fault of its peers reaches a client."""
        told = self.ledger.errors()
        assert not told, f"clients were told errors: {told[:3]}"


# --- scenarios

def kill(scene):
    """SIGKILL of each service in turn, then of all at once."""
    scene.begin()
    for victim in [*scene.random.sample(SERVICES, 4), None]:
        victims = [victim] if victim else SERVICES
        scene.note("docker kill: " + ", ".join(victims))
        scene.stack.run("docker", "kill", *map(scene.stack.container, victims))
        scene.stack.run("docker", "start", *map(scene.stack.container, victims))
        scene.going_on()
    scene.verify("after the kills")
    scene.end()


def stop(scene):
    """Graceful stop of each service in turn; it must end by itself."""
    scene.begin()
    for victim in scene.random.sample(SERVICES, 4):
        begun = time.monotonic()
        scene.stack.docker("stop", victim)
        code = scene.stack.state(victim)["ExitCode"]
        took = time.monotonic() - begun
        scene.note(f"docker stop {victim}: exit code {code} after {took:.1f} s")
        assert code == 0, f"{victim} ended with {code}: it was killed, or did not drain"
        scene.stack.docker("start", victim)
        scene.going_on()
    scene.end()


def pause(scene):
    """Each service is frozen beyond its lease, and goes on as if nothing had been."""
    scene.begin()
    for victim in scene.random.sample(SERVICES, 4):
        scene.note(f"docker pause {victim} for {BEYOND_THE_LEASE_S} s")
        scene.stack.docker("pause", victim)
        time.sleep(BEYOND_THE_LEASE_S)
        scene.stack.docker("unpause", victim)
        scene.going_on()
    scene.no_error_told()
    scene.end()


def disconnect(scene):
    """Each service loses its network beyond its lease."""
    scene.begin()
    for victim in scene.random.sample(SERVICES, 4):
        scene.note(f"docker network disconnect {victim} for {BEYOND_THE_LEASE_S} s")
        scene.stack.network("disconnect", victim)
        time.sleep(BEYOND_THE_LEASE_S)
        scene.stack.network("connect", victim)
        scene.going_on()
    scene.no_error_told()
    scene.end()


def zombie_store(scene):
    """A store sleeps beyond its lease while its blocks are wanted by others, then wakes up."""
    scene.begin(replicas=1)
    victim = scene.random.choice(STORES)
    scene.stack.docker("pause", victim)
    scene.note(f"{victim} is frozen, with bios in its hands")
    time.sleep(BEYOND_THE_LEASE_S)
    # Writes go on elsewhere; reads of what lies on the sleeper have to wait.
    for round in range(3):
        name = f"other{round}"
        scene.stack.endio("volume", "create", name, "--size", "4MiB")
        scene.stack.endio("write", name, "--dsync", stdin=bytes([round + 1]) * (4 << 20))
    scene.note("12 MiB of other volumes were written meanwhile")
    scene.stack.docker("unpause", victim)
    scene.note(f"{victim} wakes up")
    scene.going_on()
    for round in range(3):
        back = scene.stack.endio("read", f"other{round}", "--length", str(4 << 20))
        assert back == bytes([round + 1]) * (4 << 20), f"other{round} reads otherwise"
    scene.note("the other volumes are as they were written")
    scene.end()


def zombie_writeback(scene):
    """A writeback sleeps, another one takes its volume over, the first wakes up: it is fenced."""
    scene.begin()
    scene.importer.join(PATIENCE_S + 60)
    assert scene.imported is True, scene.imported
    scene.ledger.stop()
    scene.stack.endio("sync")
    scene.verify("before the takeover")
    stack = scene.stack
    stack.endio("volume", "create", "taken", "--size", "1MiB")
    stack.endio("write", "taken", "--dsync", stdin=b"1" * (1 << 20))
    stack.docker("pause", "writeback")
    scene.note("writeback is frozen")
    second, port = f"{stack.project}-second", free_port()
    stack.extra.append(second)
    stack.run("docker", "create", "--name", second, "--network", f"{stack.project}_front",
              "-p", f"127.0.0.1:{port}:7400", "--read-only", "--tmpfs",
              "/var/lib/endio/data:uid=65532,gid=65532", *stack.certificate("writeback"),
              stack.image, "endio-writeback", f"--tls-dir={TLS_DIR}",
              "--cache-dir", "/var/lib/endio/data", "--listen", "0.0.0.0:7400",
              "--conversion", "https://conversion:7401")
    stack.run("docker", "network", "connect", f"{stack.project}_back", second)
    stack.run("docker", "start", second)
    deadline = time.monotonic() + 60
    while b"SERVING" not in stack.endio("health", port=port, check=False):
        assert time.monotonic() < deadline, "the second writeback is not ready"
        time.sleep(0.5)
    stack.endio("volume", "open", "taken", "--force", port=port)
    stack.endio("write", "taken", "--dsync", stdin=b"2" * (1 << 20), port=port)
    scene.note("a second writeback has taken the volume over and overwritten it")
    stack.docker("unpause", "writeback")
    scene.note("the first wakes up")
    stack.wait_healthy(["writeback"])
    refused = stack.endio("write", "taken", "--dsync", "--patience", "5s", stdin=b"3" * 4096,
                          check=False)
    back = stack.endio("read", "taken", "--length", str(1 << 20), port=port)
    assert back == b"2" * (1 << 20), f"the first has written after the takeover ({refused!r})"
    scene.note("a write through the first changed nothing")
    # A writeback checks the volumes that it may open: the second one gets the others too.
    for volume in ("ledger", "image"):
        stack.endio("volume", "close", volume)
    blocks = stack.check(port)
    scene.note(f"endio check: clean, {blocks} blocks compared with their checksums")
    assert not stack.panics(), stack.panics()
    scene.figures = scene.ledger.figures() | {"blocks verified": blocks}


def zombie_conversion(scene):
    """Conversion sleeps, a successor starts over a copy of its data, the first wakes up."""
    scene.begin()
    stack = scene.stack
    first = stack.container("conversion")
    stack.docker("pause", "conversion")
    # Frozen processes write nothing: the copy is one moment. Unlike a shared volume it has no lock
    # that the sleeper would still hold.
    stack.network("disconnect", "conversion")
    scene.note("conversion is frozen and cut off")
    second, volume = f"{stack.project}-second", f"{stack.project}_second"
    stack.run("docker", "run", "--rm", "--user", "0", "-v", f"{stack.project}_conversion:/from:ro",
              "-v", f"{volume}:/to", stack.image, "cp", "-a", "/from/.", "/to/")
    stack.extra.append(second)
    stack.run("docker", "run", "-d", "--name", second, "--network", f"{stack.project}_back",
              "--network-alias", "conversion", "--read-only", "-v", f"{volume}:/var/lib/endio/data",
              *stack.certificate("conversion"), stack.image, "endio-conversion",
              "--data-dir", "/var/lib/endio/data", "--listen", "0.0.0.0:7401",
              f"--tls-dir={TLS_DIR}")
    scene.going_on()
    scene.note("a successor serves")
    stack.docker("unpause", "conversion")
    stack.run("docker", "network", "connect", "--alias", "old", f"{stack.project}_back", first)
    scene.note("the first wakes up, and is reachable again")
    scene.going_on()
    scene.end()
    stack.run("docker", "rm", "-f", second)
    stack.run("docker", "volume", "rm", volume, check=False)


def full_disk(scene):
    """The disks of the stores run full, and are given space again."""
    scene.stack.up()
    for store in STORES:
        stack_fill(scene, store)
    scene.begin()
    scene.note("both stores run on disks of 160 MiB, 100 MiB of them taken")
    # More than there is room for; it must be refused or wait, and harm nothing else.
    scene.stack.endio("volume", "create", "large", "--size", "256MiB", "--replicas", "2")
    large = threading.Thread(target=lambda: scene.stack.endio(
        "write", "large", "--direct", "--patience", "5s", stdin=bytes([7]) * (96 << 20),
        check=False), daemon=True)
    large.start()
    large.join(PATIENCE_S)
    assert not large.is_alive(), "a write into full stores never ended"
    scene.note(f"the disks were full: {len(scene.ledger.errors())} errors told so far")
    scene.stack.endio("volume", "delete", "large")
    for store in STORES:
        scene.stack.docker_exec(store, "rm", "/var/lib/endio/data/ballast")
    scene.note("the ballast is gone")
    scene.going_on()
    # Where the disks were full for longer than the I/O timeout, one sync tells it, and only one.
    scene.stack.endio("sync", check=False)
    scene.end()


def stack_fill(scene, store):
    scene.stack.docker_exec(store, "sh", "-c",
                            "head -c 104857600 /dev/zero > /var/lib/endio/data/ballast")


def tls(scene):
    """Nobody is let in without a certificate; new ones count while everything runs."""
    stack = scene.stack
    stack.up()
    only_own_keys(scene)
    stack.endio("volume", "create", "secured", "--size", "8MiB", "--replicas", "2")
    stack.endio("write", "secured", "--dsync", stdin=b"1" * (1 << 20))
    for what, setting in {
        "the operator": "true",
        "plaintext": "unset ENDIO_TLS_DIR; ENDIO_ENDPOINT=${ENDIO_ENDPOINT/https/http}",
        # Trusts the right authority, and shows a certificate of its own.
        "another authority": "endio pki init --dir /tmp/a; endio pki issue --dir /tmp/a --admin "
                             "operator; cp $ENDIO_TLS_DIR/ca.pem /tmp/a/admin-operator; "
                             "ENDIO_TLS_DIR=/tmp/a/admin-operator",
    }.items():
        script = f"{{ {setting}; }} >/dev/null; endio status"
        done = stack.run(*stack.cli("bash", "-c", script), check=False)
        is_let_in = done.returncode == 0
        assert is_let_in == (what == "the operator"), f"{what}: {done.stdout}{done.stderr}"
        scene.note(f"{what} is " + ("let in" if is_let_in else f"refused: {done.stderr.strip()}"))
    nbd_with_certificates(scene)
    renewal(scene)
    assert stack.endio("read", "secured", "--length", str(1 << 20)) == b"1" * (1 << 20)
    assert not stack.panics(), stack.panics()


def only_own_keys(scene):
    for service in SERVICES:
        mounts = {mount["Destination"]: mount for mount in scene.stack.inspect(service)["Mounts"]}
        own = mounts.pop(TLS_DIR)
        assert not own["RW"] and own["Name"] == f"{scene.stack.project}_tls-{service}", own
        assert list(mounts) == ["/var/lib/endio/data"], f"{service} has {list(mounts)}"
        mode = scene.stack.docker_exec(service, "stat", "-c", "%a %u", f"{TLS_DIR}/key.pem").stdout
        assert mode.strip() == "600 65532", f"the key of {service}: {mode}"
    scene.note("each container has its own key only, read-only, for its user only")


def nbd_with_certificates(scene):
    """As a client of the host: deploy/nbd-tls.yml is one of this stack's files."""
    stack = scene.stack
    plain = nbd.NBD()
    try:
        plain.connect_uri(stack.uri("secured"))
    except nbd.Error as error:
        scene.note(f"NBD in the clear is refused: {error}")
    else:
        raise AssertionError("NBD in the clear was let in")
    with tempfile.TemporaryDirectory() as files:
        # As libnbd calls them.
        for ours, theirs in (("ca", "ca-cert"), ("cert", "client-cert"), ("key", "client-key")):
            text = stack.run(*stack.cli("cat", f"{TLS_DIR}/{ours}.pem")).stdout
            pathlib.Path(files, f"{theirs}.pem").write_text(text)
        client = nbd.NBD()
        client.set_tls(nbd.TLS_REQUIRE)
        client.set_tls_certificates(files)
        client.set_export_name("secured")
        client.connect_tcp("localhost", str(stack.nbd_port))
        assert client.get_tls_negotiated(), "no TLS"
        client.pwrite(b"2" * 4096, 4 << 20, nbd.CMD_FLAG_FUA)
        assert client.pread(4096, 4 << 20) == b"2" * 4096
        client.shutdown()
    scene.note("NBD with a certificate wrote and read")


def renewal(scene):
    """Certificates are replaced; what runs takes them over without a restart."""
    stack = scene.stack

    def shown():
        return ssl.get_server_certificate(("127.0.0.1", stack.grpc_port), timeout=10)

    before, starts = shown(), {s: stack.state(s)["StartedAt"] for s in SERVICES}
    stack.compose("run", "--rm", "pki")
    assert stack.run(*stack.cli("endio", "status")).returncode == 0
    # Nothing was near its end: the same are there.
    time.sleep(BEYOND_A_RELOAD_S)
    assert shown() == before, "a certificate was replaced that had its life before it"
    # As if all had come to their end.
    ends = "rm /var/lib/endio/pki/[!a]*/cert.pem"
    stack.compose("run", "--rm", "pki", "bash", "-c", ends)
    stack.compose("run", "--rm", "pki")
    deadline = time.monotonic() + 60
    while shown() == before:
        assert time.monotonic() < deadline, "writeback still shows its old certificate"
        time.sleep(0.5)
    for victim in STORES:
        # Connections that stand go on; these must be made anew, with the new files.
        stack.network("disconnect", victim)
        time.sleep(2)
        stack.network("connect", victim)
    stack.wait_healthy()
    stack.endio("write", "secured", "--offset", "1MiB", "--dsync", stdin=b"3" * 65536)
    assert {s: stack.state(s)["StartedAt"] for s in SERVICES} == starts, "something was restarted"
    scene.note("every certificate was replaced while everything ran")


SCENARIOS = {
    "kill": kill,
    "stop": stop,
    "pause": pause,
    "disconnect": disconnect,
    "zombie-store": zombie_store,
    "zombie-writeback": zombie_writeback,
    "zombie-conversion": zombie_conversion,
    "full-disk": full_disk,
    "tls": tls,
}
FILES = {"full-disk": ("docker-compose.yml", "tests/chaos/full-disk.yml"),
         "tls": ("docker-compose.yml", "deploy/nbd-tls.yml")}


def short(scene):
    """What CI runs: one of each kind on one stack."""
    scene.begin()
    stack = scene.stack
    properties(scene)
    for victim in scene.random.sample(SERVICES, 2) + ["writeback"]:
        scene.note(f"docker kill {victim}")
        stack.docker("kill", victim)
        stack.docker("start", victim)
        scene.going_on()
    victim = scene.random.choice(STORES)
    scene.note(f"docker pause {victim}")
    stack.docker("pause", victim)
    time.sleep(BEYOND_THE_LEASE_S)
    stack.docker("unpause", victim)
    scene.going_on()
    for verb in ("disconnect", "connect"):
        scene.note(f"docker network {verb} conversion")
        stack.network(verb, "conversion")
        time.sleep(2)
    scene.going_on()
    stack.docker("stop", "block-store-1")
    scene.note(f"docker stop block-store-1: exit code {stack.state('block-store-1')['ExitCode']}")
    assert stack.state("block-store-1")["ExitCode"] == 0
    stack.docker("start", "block-store-1")
    scene.going_on()
    scene.end()


def properties(scene):
    """What docker-compose.yml promises of each container."""
    for service in SERVICES:
        found = scene.stack.inspect(service)
        host, config = found["HostConfig"], found["Config"]
        assert config["User"] == "65532:65532", f"{service} runs as {config['User']!r}"
        assert host["ReadonlyRootfs"], f"{service} can write its root file system"
        assert host["CapDrop"] in (["ALL"], ["CAP_ALL"]), f"{service} has capabilities"
        assert any("no-new-privileges" in option for option in host["SecurityOpt"]), service
        assert host["Memory"] > 0, f"{service} has no limit of memory"
        assert host["RestartPolicy"]["Name"] == "unless-stopped", service
        for published in (host["PortBindings"] or {}).values():
            assert all(p["HostIp"] == "127.0.0.1" for p in published), f"{service}: {published}"
        kinds = {mount["Destination"]: mount["Type"] for mount in found["Mounts"]}
        assert kinds.get("/var/lib/endio/data") == "volume", f"{service}: {kinds}"
        done = scene.stack.docker_exec(service, "touch", "/etc/x", check=False)
        assert done.returncode != 0, f"{service}: /etc can be written"
    scene.note("each container: not root, read-only, limited, restarted, on loopback only")


def perform(name, image, seed):
    scenario = short if name == "short" else SCENARIOS[name]
    print(f"==== {name}: {scenario.__doc__} (seed {seed})", flush=True)
    begun = time.monotonic()
    scene = Scene(name, image, seed, FILES.get(name, ("docker-compose.yml",)))
    fault = None
    try:
        scenario(scene)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        logs = scene.stack.compose("logs", "--no-color", "--tail=60", check=False).stdout
        print(logs)
        print(f"FAIL {name}: {fault}", flush=True)
    finally:
        scene.stack.down()
    took = time.monotonic() - begun
    if not fault:
        print(f"ok   {name}: {took:.0f} s, {scene.figures}", flush=True)
    return {"scenario": name, "what": scenario.__doc__, "seed": seed, "seconds": round(took),
            "fault": fault, "notes": scene.notes, "figures": scene.figures}


def report(path, results):
    lines = ["# Chaos on containers", "",
             f"{datetime.datetime.now():%Y-%m-%d %H:%M}, {os.cpu_count()} processors, load "
             f"{os.getloadavg()[0]:.1f} at the end.", ""]
    for result in results:
        verdict = f"FAILED: {result['fault']}" if result["fault"] else "passed"
        lines += [f"## {result['scenario']}: {verdict}", "",
                  f"{result['what']} Seed {result['seed']}, {result['seconds']} s.", ""]
        start = result["notes"][0][0] if result["notes"] else 0
        lines += [f"* {at - start:6.1f} s: {text}" for at, text in result["notes"]]
        lines += [f"* figures: {json.dumps(result['figures'])}", ""]
    path.write_text("\n".join(lines))
    print(f"report: {path}")


def main():
    wanted = sys.argv[1:]
    if wanted == ["list"]:
        for name, scenario in {**SCENARIOS, "short": short}.items():
            print(f"{name:18} {scenario.__doc__}")
        return
    names = list(SCENARIOS) if wanted == ["all"] else wanted
    unknown = [name for name in names if name not in SCENARIOS and name != "short"]
    if not names or unknown:
        sys.exit(f"usage: run.sh SCENARIO…|all|short|list; unknown: {unknown}")
    seed = int(os.environ.get("ENDIO_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"seed {seed}; replay: ENDIO_SEED={seed} tests/chaos/run.sh {' '.join(wanted)}")
    image = os.environ.get("ENDIO_IMAGE", "endio:test")
    results = [perform(name, image, seed) for name in names]
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    target.mkdir(parents=True, exist_ok=True)
    report(target / "chaos-report.md", results)
    sys.exit(any(result["fault"] for result in results))


if __name__ == "__main__":
    main()
