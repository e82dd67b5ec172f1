"""The project's own containers, driven by docker compose."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVICES = ["conversion", "block-store-1", "block-store-2", "writeback"]
# Where each container has its certificate.
TLS_DIR = "/var/lib/endio/tls"


def compose_command():
    """`docker compose`, or the older program; None: there is neither."""
    if not shutil.which("docker"):
        return None
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Stack:
    """A project of docker compose with names and ports of its own; always torn down."""

    def __init__(self, name, image, files=("docker-compose.yml",)):
        self.project, self.image = name, image
        self.grpc_port, self.nbd_port = free_port(), free_port()
        self.files = [arg for file in files for arg in ("-f", str(ROOT / file))]
        self.env = {**os.environ, "ENDIO_IMAGE": image, "ENDIO_GRPC_PORT": str(self.grpc_port),
                    "ENDIO_NBD_PORT": str(self.nbd_port), "COMPOSE_PROJECT_NAME": name}
        self.extra = []

    def run(self, *command, check=True, seconds=300, **more):
        done = subprocess.run(command, text=True, capture_output=True, env=self.env, cwd=ROOT,
                              timeout=seconds, **more)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done

    def compose(self, *args, **more):
        return self.run(*compose_command(), *self.files, *args, **more)

    def up(self):
        # Returns once everything that others wait for is healthy; writeback is the last.
        self.compose("up", "-d", "--no-build", *SERVICES)
        self.wait_healthy(SERVICES)

    def down(self):
        for name in self.extra:
            self.run("docker", "rm", "-f", "-v", name, check=False)
        for service in SERVICES:
            # A container that is paused cannot be removed.
            if self.state(service).get("Paused"):
                self.docker("unpause", service, check=False)
        self.compose("--profile", "tools", "--profile", "demo", "down", "-v", "--remove-orphans",
                     "-t", "5", check=False)

    def container(self, service):
        found = self.run("docker", "ps", "-aq",
                         "--filter", f"label=com.docker.compose.project={self.project}",
                         "--filter", f"label=com.docker.compose.service={service}",
                         "--filter", "label=com.docker.compose.oneoff=False").stdout.split()
        return found[0] if found else None

    def docker(self, verb, service, *flags, check=True):
        return self.run("docker", verb, *flags, self.container(service), check=check)

    def docker_exec(self, service, *command, check=True):
        return self.run("docker", "exec", self.container(service), *command, check=check)

    def inspect(self, service):
        container = self.container(service)
        return json.loads(self.run("docker", "inspect", container).stdout)[0] if container else {}

    def state(self, service):
        return self.inspect(service).get("State", {})

    def wait_healthy(self, services=SERVICES, seconds=120):
        deadline = time.monotonic() + seconds
        waiting = list(services)
        while waiting:
            states = {s: self.state(s).get("Health", {}).get("Status") for s in waiting}
            waiting = [s for s, status in states.items() if status != "healthy"]
            if waiting and time.monotonic() > deadline:
                logs = self.compose("logs", "--tail=20", *waiting, check=False).stdout
                raise AssertionError(f"not healthy in {seconds} s: {states}\n{logs}")
            if waiting:
                time.sleep(0.5)

    def network(self, verb, service, network="back"):
        name = f"{self.project}_{network}"
        flags = ["--alias", service] if verb == "connect" else []
        self.run("docker", "network", verb, *flags, name, self.container(service))

    def endio(self, *args, stdin=None, check=True, seconds=400, port=None):
        """The command line, as the operator, from outside of the stack's networks."""
        done = subprocess.run(self.cli("endio", *args, port=port), input=stdin,
                              capture_output=True, timeout=seconds)
        if check and done.returncode != 0:
            raise AssertionError(f"endio {' '.join(args)}: {done.stderr.decode()}")
        return done.stdout

    def cli(self, *command, port=None):
        """A command in a container with the operator's certificate, on the host's network."""
        endpoint = f"https://127.0.0.1:{port or self.grpc_port}"
        return ["docker", "run", "--rm", "-i", "--network", "host", "--read-only",
                "--tmpfs", "/tmp", *self.certificate("operator"),
                "-e", f"ENDIO_ENDPOINT={endpoint}", "-e", f"ENDIO_TLS_DIR={TLS_DIR}",
                self.image, *command]

    def certificate(self, holder):
        """Flags of `docker run` that give a container the certificate of one of the stack's own."""
        return ["-v", f"{self.project}_tls-{holder}:{TLS_DIR}:ro"]

    def json(self, *args, **more):
        return json.loads(self.endio("--json", *args, **more))

    def uri(self, volume, port=None):
        return f"nbd://127.0.0.1:{port or self.nbd_port}/{volume}"

    def check(self, port=None):
        """`endio check`: every invariant, and every block against its checksum."""
        found = json.loads(self.endio("--json", "check", check=False, port=port) or b"{}")
        assert found.get("clean"), f"endio check: {found}"
        return found["blocks_verified"]

    def panics(self):
        logs = self.compose("logs", "--no-color", check=False).stdout
        return [line for line in logs.splitlines() if "panicked" in line]
