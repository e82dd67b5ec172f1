"""A ledger of acknowledged writes over NBD: what was written, what was acknowledged, what is read.

Each thread owns a region of the volume and has one request under way at a time. A cell of 4 KiB holds
its number and the number of the write, 256 times over, so a foreign, stale or torn cell names itself.
A write whose outcome is not known may or may not be there; an acknowledged one must be, unless a later
one is. Nothing is flushed before it counts: killing processes must lose nothing that was acknowledged.
"""

import random
import struct
import threading
import time

import nbd

CELL = 4096
MARK = struct.Struct("<4sIII")
MAGIC = b"endi"
CELLS_PER_WRITE = 16


def cell(number, write):
    """Contents of a cell; write 0: never written, or zeroed."""
    if write == 0:
        return bytes(CELL)
    return MARK.pack(MAGIC, number, write, number ^ write) * (CELL // MARK.size)


def name_of(data):
    """What a cell says that it is."""
    if not any(data):
        return 0
    magic, number, write, check = MARK.unpack_from(data)
    if magic != MAGIC or check != number ^ write or data != cell(number, write):
        return f"torn or foreign: {data[:32].hex()}"
    return write, number


class Worker(threading.Thread):
    """One thread and its region."""

    def __init__(self, ledger, index, cells):
        super().__init__(daemon=True)
        self.ledger, self.base, self.cells = ledger, index * cells, cells
        self.random = random.Random(f"{ledger.seed}/{index}")
        # Write numbers that each cell may show.
        self.allowed = [{0} for _ in range(cells)]
        self.writes = self.acknowledged = self.unknown = self.reads = self.connections = 0
        self.told = []
        self.wrong = []
        self.client = None
        # Held during a request. Between two of them a worker stands still while `go_on` is not set.
        self.idle = threading.Lock()
        self.go_on = threading.Event()
        self.go_on.set()

    def run(self):
        while not self.ledger.stopping.is_set() and not self.wrong:
            with self.idle:
                self.step()
            self.go_on.wait()

    def connect(self, deadline):
        while self.client is None:
            try:
                client = nbd.NBD()
                client.connect_uri(self.ledger.uri)
                self.client = client
                self.connections += 1
            except nbd.Error as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nobody serves {self.ledger.uri}: {error}") from error
                time.sleep(0.1)

    def step(self):
        first = self.random.randrange(self.cells)
        count = self.random.randint(1, min(CELLS_PER_WRITE, self.cells - first))
        kind = self.random.random()
        if kind < 0.15:
            self.read(first, count)
        elif kind < 0.22:
            self.change(first, count, 0, lambda c, at, n: c.zero(n, at))
        elif kind < 0.27:
            self.change(first, 0, 0, lambda c, at, n: c.flush())
        else:
            self.writes += 1
            write = self.writes
            data = b"".join(cell(self.base + first + i, write) for i in range(count))
            flags = nbd.CMD_FLAG_FUA if kind < 0.35 else 0
            self.change(first, count, write, lambda c, at, n: c.pwrite(data, at, flags))

    def change(self, first, count, write, request):
        """Carries a request out, again and again until it is acknowledged or the stop comes."""
        deadline = time.monotonic() + self.ledger.patience
        while True:
            try:
                self.connect(deadline)
                request(self.client, (self.base + first) * CELL, count * CELL)
                break
            except nbd.Error as error:
                # Not known: it may have happened, or happen never.
                for at in range(first, first + count):
                    self.allowed[at].add(write)
                self.unknown += 1
                self.lost(error)
                if self.ledger.stopping.is_set():
                    return
                if time.monotonic() > deadline:
                    self.wrong.append(f"no success in {self.ledger.patience} s: {error}")
                    return
                time.sleep(0.05)
            except TimeoutError as error:
                self.wrong.append(str(error))
                return
        for at in range(first, first + count):
            self.allowed[at] = {write}
        self.acknowledged += 1

    def read(self, first, count):
        try:
            self.connect(time.monotonic() + self.ledger.patience)
            data = self.client.pread(count * CELL, (self.base + first) * CELL)
        except nbd.Error as error:
            self.lost(error)
            return
        except TimeoutError as error:
            self.wrong.append(str(error))
            return
        self.judge(first, data)

    def lost(self, error):
        """An error reply leaves the connection as it is; a broken one is opened anew."""
        if self.client and self.client.aio_is_ready():
            self.told.append((time.time(), str(error)))
            return
        self.client = None

    def judge(self, first, data):
        for i in range(len(data) // CELL):
            self.reads += 1
            number = first + i
            found = name_of(data[i * CELL:(i + 1) * CELL])
            allowed = self.allowed[number]
            if found == 0 and 0 in allowed:
                continue
            if isinstance(found, tuple) and found[1] == self.base + number and found[0] in allowed:
                continue
            self.wrong.append(
                f"cell {self.base + number}: found {found}, allowed {sorted(allowed)}")


class Ledger:
    """Several workers on one volume."""

    def __init__(self, uri, seed, threads=3, cells=512, patience=240):
        self.uri, self.seed, self.patience = uri, seed, patience
        self.stopping = threading.Event()
        self.workers = [Worker(self, index, cells) for index in range(threads)]

    @staticmethod
    def bytes(threads=3, cells=512):
        return threads * cells * CELL

    def start(self):
        for worker in self.workers:
            worker.start()

    def acknowledged(self):
        return [worker.acknowledged for worker in self.workers]

    def progress(self, more, seconds):
        """Waits until each worker has got so many more acknowledgements."""
        aims = [count + more for count in self.acknowledged()]
        deadline = time.monotonic() + seconds
        while any(have < aim for have, aim in zip(self.acknowledged(), aims)):
            self.complain()
            if time.monotonic() > deadline:
                raise AssertionError(f"no progress in {seconds} s: {self.acknowledged()} of {aims}")
            time.sleep(0.05)

    def complain(self):
        wrong = [line for worker in self.workers for line in worker.wrong]
        if wrong:
            raise AssertionError("; ".join(wrong[:5]))

    def stop(self):
        self.stopping.set()
        for worker in self.workers:
            worker.join(self.patience + 30)
            if worker.is_alive():
                raise AssertionError("a request never ended")
        self.complain()

    def verify(self, uri=None):
        """Reads everything on a connection of its own. Number of cells."""
        client = nbd.NBD()
        client.connect_uri(uri or self.uri)
        for worker in self.workers:
            # What is read must be judged by what was acknowledged before, and by nothing later.
            worker.go_on.clear()
            try:
                with worker.idle:
                    for first in range(0, worker.cells, 64):
                        count = min(64, worker.cells - first)
                        data = client.pread(count * CELL, (worker.base + first) * CELL)
                        worker.judge(first, data)
            finally:
                worker.go_on.set()
        client.shutdown()
        self.complain()
        return sum(worker.cells for worker in self.workers)

    def errors(self):
        return [told for worker in self.workers for told in worker.told]

    def figures(self):
        total = lambda name: sum(getattr(worker, name) for worker in self.workers)
        return {name: total(name) for name in
                ("writes", "acknowledged", "unknown", "reads", "connections")} | {
                    "errors told": len(self.errors()),
                    "first error told": next((text for _, text in self.errors()), None)}
