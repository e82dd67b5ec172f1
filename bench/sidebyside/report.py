"""Tables in Markdown from the results of all rounds."""

import statistics

from sidebyside.rows import ROWS

# Row, peer, and the least ratio of endio to it that the project aims at.
AIMS = [
    ("rand-write-fsync-32", "qemu-qcow2", 1.5),
    ("rand-write-fsync-1", "qemu-qcow2", 1.0),
    ("rand-write", "nbdkit-file", 0.8),
    ("rand-write-flushed", "nbdkit-file", 0.8),
    ("seq-write", "qemu-qcow2", 1.2),
    ("rand-read-cold", "qemu-qcow2", 1.0),
    ("rand-read-cached", "nbdkit-file", 0.8),
    ("rand-write-fsync-32", "ceph-rbd", 3.0),
    ("rand-write-fsync-1", "ceph-rbd", 3.0),
    ("rand-write", "ceph-rbd", 3.0),
    ("rand-write-flushed", "ceph-rbd", 3.0),
    ("seq-write", "ceph-rbd", 3.0),
]
BEGIN = "<!-- side-by-side: begin, written by bench/side-by-side -->"
END = "<!-- side-by-side: end -->"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value):
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values):
    """Median, with the least and the greatest behind it."""
    values = sorted(values)
    if not values:
        return "–"
    middle = number(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({number(values[0])}…{number(values[-1])})"


class Results:
    def __init__(self, found, kinds):
        self.found = found
        self.kinds = kinds
        ran = {result["row"] for result in found}
        self.rows = [row for row in ROWS if row.name in ran]

    def of(self, kind, row, key):
        return [result[key] for result in self.found
                if result["server"] == kind and result["row"] == row]

    def rounds(self, kind, row, key):
        """The mean of each round: a server may run more than once in it."""
        by_round = {}
        for result in self.found:
            if result["server"] == kind and result["row"] == row:
                by_round.setdefault(result["round"], []).append(result[key])
        return {number: statistics.mean(values) for number, values in by_round.items()}

    def ratios(self, row, ours, theirs, key):
        """One ratio for each round in which both ran."""
        mine, peer = self.rounds(ours, row, key), self.rounds(theirs, row, key)
        return [mine[number] / peer[number] for number in mine if peer.get(number)]

    def throughput(self):
        rows = []
        for row in self.rows:
            key = "mib_per_second" if row.name == "seq-write" else "per_second"
            unit = "MiB/s" if row.name == "seq-write" else "per s"
            rows.append([f"{row.title}, {unit}"]
                        + [spread(self.of(kind, row.name, key)) for kind in self.kinds])
        return table(["row"] + self.kinds, rows)

    def aims(self):
        rows = []
        for row, peer, least in AIMS:
            title = next((known.title for known in self.rows if known.name == row), None)
            if title is None or peer not in self.kinds:
                continue
            line = [title, peer, f"{least}"]
            for ours in ("endio", "endio-up"):
                ratios = self.ratios(row, ours, peer, "per_second")
                line.append(spread(ratios))
            ratios = self.ratios(row, "endio", peer, "per_second")
            line.append("yes" if ratios and statistics.median(ratios) >= least else "**no**")
            rows.append(line)
        return table(["row", "against", "aim", "endio", "endio-up", "reached by endio"], rows)

    def cpu(self):
        rows = []
        for row in self.rows:
            line = [row.title]
            for kind in self.kinds:
                line.append(spread(self.of(kind, row.name, "cpu_us_all")))
            rows.append(line)
        return table(["row"] + self.kinds, rows)

    def cpu_of_services(self, kind="endio"):
        rows = []
        for row in self.rows:
            found = self.of(kind, row.name, "cpu_us")
            if found:
                rows.append([row.title] + [spread([used[name] for used in found])
                                           for name in sorted(found[0])])
        names = sorted(self.of(kind, self.rows[0].name, "cpu_us")[0])
        return table(["row"] + names, rows)

    def memory(self):
        rows = []
        for kind in self.kinds:
            found = [result["peak_mib"] for result in self.found if result["server"] == kind]
            if found:
                names = sorted(found[0])
                most = {name: max(peaks[name] for peaks in found) for name in names}
                rows.append([kind, ", ".join(f"{name} {number(most[name])}" for name in names),
                             number(max(sum(peaks.values()) for peaks in found))])
        return table(["server", "processes, MiB", "together, MiB"], rows)

    def latencies(self):
        rows = []
        for row in self.rows:
            line = [row.title]
            for kind in self.kinds:
                took = self.of(kind, row.name, "latency_us")
                waits = [value for value in self.of(kind, row.name, "fsync_us") if value]
                text = spread(took)
                line.append(f"{text}; fsync {spread(waits)}" if waits else text)
            rows.append(line)
        return table(["row"] + self.kinds, rows)

    def tracing(self):
        if "endio-trace-0" not in self.kinds:
            return ""
        rows = []
        for row in self.rows:
            rows.append([row.title]
                        + [spread(self.ratios(row.name, ours, "endio-trace-0", "per_second"))
                           for ours in ("endio", "endio-trace-100")])
        return table(["row, ratio to tracing off", "1 %", "100 %"], rows)

    def services(self):
        return "endio" in self.kinds

    def text(self, conditions):
        parts = [BEGIN, conditions]

        def add(title, body):
            if body:
                parts.append(f"**{title}**\n\n{body}")

        add("Ratios of throughput: median of the rounds (least…greatest)", self.aims())
        add("Throughput", self.throughput())
        add("CPU of all processes of the server, µs for each I/O", self.cpu())
        if self.services():
            add("CPU of endio's services, µs for each I/O", self.cpu_of_services())
        add("Mean latency, µs", self.latencies())
        add("Peak resident memory", self.memory())
        add("Tracing", self.tracing())
        parts.append(END)
        return "\n\n".join(parts) + "\n"


def put_into(path, text, first=BEGIN, last=END):
    """Replaces what stands between the marks of the document."""
    document = path.read_text()
    begin, end = document.find(first), document.find(last)
    if begin < 0 or end < begin:
        raise SystemExit(f"{path} has no place for the tables: {first} … {last}")
    path.write_text(document[:begin] + text.rstrip("\n") + document[end + len(last):])
