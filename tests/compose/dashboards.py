"""Checks deploy/observability without its images: every metric that a dashboard asks for stands in
docs/OBSERVABILITY.md, with its labels, and every name that a file gives to another service is a
service of docker-compose.yml.

    python3 tests/compose/dashboards.py
"""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "deploy/observability"
# What Prometheus and its functions add to a name.
ENDINGS = ("_bucket", "_count", "_sum")
# Labels that the scraper gives.
SCRAPED = {"instance", "job", "le"}


def documented():
    """Names of metrics with their labels."""
    found = {}
    for line in (ROOT / "docs/OBSERVABILITY.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 4 and re.fullmatch(r"`endio_\w+`", cells[1]):
            found[cells[1].strip("`")] = set(re.findall(r"`(\w+)`(?: =|,|$|;)", cells[3]))
    legs = re.search(r"`(endio_leg_seconds)` \(histogram.*label `(\w+)`",
                     (ROOT / "docs/OBSERVABILITY.md").read_text())
    found[legs.group(1)] = {legs.group(2)}
    return found


def faults(name, dashboard, metrics):
    if not dashboard["panels"]:
        yield f"{name}: it shows nothing"
    ids = [panel["id"] for panel in dashboard["panels"]]
    if len(ids) != len(set(ids)):
        yield f"{name}: two panels with one id"
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            labels = set()
            for used in re.findall(r"\bendio_\w+", target["expr"]):
                base = next((used.removesuffix(e) for e in ENDINGS
                             if used.endswith(e) and used.removesuffix(e) in metrics), used)
                if base not in metrics:
                    yield f"{name}, {panel['title']}: no metric {used}"
                    continue
                labels |= metrics[base]
            asked = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            for by in re.findall(r"by \(([^)]*)\)", target["expr"]):
                asked |= {label.strip() for label in by.split(",")}
            for label in sorted(asked - labels - SCRAPED):
                yield f"{name}, {panel['title']}: no label {label} on {target['expr']}"


def main():
    metrics = documented()
    assert len(metrics) > 40, f"only {len(metrics)} metrics are found in the document"
    found = []
    names = sorted((HERE / "grafana/dashboards").glob("*.json"))
    for path in names:
        found += faults(path.name, json.loads(path.read_text()), metrics)
    assert names, "no dashboard"
    compose = (ROOT / "docker-compose.yml").read_text()
    services = set(re.findall(r"^  ([a-z0-9-]+):$", compose, re.M))
    for path in sorted(HERE.rglob("*.y*ml")):
        for host in re.findall(r"(?:https?://|[ \"-]+)([a-z][a-z0-9-]*):\d{4,5}", path.read_text()):
            if host not in services:
                found.append(f"{path.name}: {host} is no service of docker-compose.yml")
    # A check that finds nothing proves nothing.
    bad = {"panels": [{"id": 1, "title": "t", "targets": [
        {"expr": "sum by (kind) (endio_nothing_total)", "legendFormat": ""},
        {"expr": "endio_ready", "legendFormat": "{{colour}}"}]}]}
    assert len(list(faults("planted", bad, metrics))) == 3, "planted faults are not found"
    for fault in found:
        print(f"FAIL {fault}")
    if not found:
        print(f"ok   {len(names)} dashboards ask only for metrics that are documented")
    sys.exit(bool(found))


main()
