"""Ceph RBD with one monitor and one OSD (BlueStore on a file), pool size 1, driven by fio's rbd engine.

fio speaks to the OSD itself, without NBD between: one hop less than all others have.
"""

import json
import os
import subprocess
import time
import uuid

from sidebyside.servers import NAME, READY_SECONDS, Server, free_port, output

POOL = "rbd"


class CephRbd(Server):
    durability = "WRITE: BlueStore's log, fdatasync; FLUSH: nothing more (no client cache)"

    def prepare(self):
        super().prepare()
        port = free_port()
        config = self.directory / "ceph.conf"
        config.write_text(f"""[global]
fsid = {uuid.uuid4()}
mon_initial_members = a
mon_host = v2:127.0.0.1:{port}
ms_bind_msgr1 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 32
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data_avail_crit = 1
mon_osd_full_ratio = 0.99
osd_objectstore = bluestore
bluestore_block_size = {8 * self.size}
bluestore_block_create = true
osd_memory_target = 2147483648
run_dir = {self.directory}
admin_socket = {self.directory}/$name.asok
log_file = {self.directory}/$name.log
pid_file =
mon_data = {self.directory}/mon
osd_data = {self.directory}/osd
keyring = {self.directory}/keyring
rbd_cache = false
""")
        (self.directory / "mon").mkdir()
        (self.directory / "osd").mkdir()
        run = self.run
        run("ceph-authtool", "--create-keyring", self.directory / "keyring", "--gen-key", "-n",
            "mon.", "--cap", "mon", "allow *")
        run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{port}]", "--fsid",
            output("ceph-conf", "-c", str(config), "--lookup", "fsid"),
            self.directory / "monmap")
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", self.directory / "monmap", "--keyring",
            self.directory / "keyring")
        self.is_new = True

    def config(self):
        return {"CEPH_CONF": str(self.directory / "ceph.conf")}

    def run(self, *words):
        words = [str(word) for word in words]
        done = subprocess.run(words, capture_output=True, text=True, timeout=READY_SECONDS,
                              env={**os.environ, **self.config()})
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()[-500:]}")
        return done.stdout

    def start(self):
        self.spawn("ceph-mon", "ceph-mon", "-f", "-i", "a", env=self.config())
        self.until(lambda: self.run("ceph", "--connect-timeout=5", "-s"))
        if self.is_new:
            osd_uuid = str(uuid.uuid4())
            self.run("ceph", "osd", "new", osd_uuid)
            self.run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd_uuid)
        self.spawn("ceph-osd", "ceph-osd", "-f", "-i", "0", env=self.config())
        self.until(self.is_up)
        if self.is_new:
            self.run("ceph", "osd", "pool", "create", POOL, "32", "32", "replicated")
            self.run("ceph", "osd", "pool", "application", "enable", POOL, "rbd")
            self.run("rbd", "create", f"{POOL}/{NAME}", "--size", f"{self.size >> 20}M")
            self.is_new = False
        self.uri = "rbd"

    def is_up(self):
        if json.loads(self.run("ceph", "osd", "stat", "-f", "json"))["num_up_osds"] < 1:
            raise RuntimeError("the OSD is not up")

    @staticmethod
    def until(call):
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                return call()
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def stop_order(self):
        return ["ceph-osd", "ceph-mon"]

    def engine(self):
        return ["--ioengine=rbd", "--clientname=admin", f"--pool={POOL}", f"--rbdname={NAME}"]

    def version(self):
        return output("ceph", "--version")
