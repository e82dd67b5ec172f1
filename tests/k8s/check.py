"""Checks the manifests of k8s/ without a cluster.

    tests/k8s/run.sh DIRECTORY-OF-BINARIES

* Each overlay is rendered: by the part of kustomize that it uses, written below; what the part does
  not know is an error. Where `kustomize` or `kubectl` is installed, both must render the same.
* Each object is valid by the schemas of Kubernetes, and nothing in it is unknown to them.
* The binaries take the arguments of the manifests (`--check-config`), listen where probes, services
  and policies point, and their deadlines for a stop end before the pod is killed.
* The network policies allow the arrows of ARCHITECTURE.md, and nothing else.
* Each of these checks finds a fault that is planted.
"""

import copy
import json
import pathlib
import shutil
import subprocess
import sys
import tomllib

import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The oldest and the newest release whose schemas are asked.
VERSIONS = ["1.29", "1.34"]
COMPONENT = "app.kubernetes.io/component"
# Who may connect to whom, at which port. ARCHITECTURE.md, "Overview"; clients and the resolver are
# outside of endio.
ARROWS = {
    ("client", "writeback", 7400),
    ("client", "writeback", 10809),
    ("writeback", "conversion", 7401),
    ("writeback", "block-store", 7402),
    ("block-store", "conversion", 7401),
    ("block-store", "dns", 53),
    ("writeback", "dns", 53),
    ("prometheus", "conversion", 9464),
    ("prometheus", "block-store", 9464),
    ("prometheus", "writeback", 9464),
}
SERVICES = ["conversion", "block-store", "writeback"]


# --- kustomize, as far as the overlays use it

KNOWN = {"apiVersion", "kind", "resources", "components", "labels", "namespace", "images",
         "replicas", "patches"}
CLUSTER_WIDE = {"Namespace"}


def documents(path):
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def render(directory, below=()):
    """Objects of a kustomization. `below`: those that a component changes."""
    directory = directory.resolve()
    settings = documents(directory / "kustomization.yaml")[0]
    unknown = set(settings) - KNOWN
    assert not unknown, f"{directory}: this renderer does not know {unknown}"
    objects = list(below)
    for name in settings.get("resources", []):
        path = directory / name
        objects += render(path) if path.is_dir() else documents(path)
    for name in settings.get("components", []):
        objects = render(directory / name, objects)
    for patch in settings.get("patches", []):
        apply_patch(objects, directory, patch)
    for label in settings.get("labels", []):
        add_labels(objects, label)
    for image in settings.get("images", []):
        for container in containers(objects):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    for replicas in settings.get("replicas", []):
        for found in objects:
            if found["kind"] == "StatefulSet" and found["metadata"]["name"] == replicas["name"]:
                found["spec"]["replicas"] = replicas["count"]
    if "namespace" in settings:
        for found in objects:
            if found["kind"] not in CLUSTER_WIDE:
                found["metadata"]["namespace"] = settings["namespace"]
    return objects


def containers(objects):
    for found in objects:
        if found["kind"] == "StatefulSet":
            yield from found["spec"]["template"]["spec"]["containers"]


def add_labels(objects, label):
    pairs = label["pairs"]
    assert label.get("includeSelectors") and label.get("includeTemplates"), "not written here"
    for found in objects:
        found["metadata"].setdefault("labels", {}).update(pairs)
        kind, spec = found["kind"], found.get("spec", {})
        if kind == "Service":
            spec["selector"].update(pairs)
        if kind == "StatefulSet":
            spec["selector"]["matchLabels"].update(pairs)
            spec["template"]["metadata"].setdefault("labels", {}).update(pairs)
            for claim in spec.get("volumeClaimTemplates", []):
                claim["metadata"].setdefault("labels", {}).update(pairs)
            affinity = spec["template"]["spec"].get("affinity", {}).get("podAntiAffinity", {})
            for term in affinity.get("preferredDuringSchedulingIgnoredDuringExecution", []):
                term["podAffinityTerm"]["labelSelector"].setdefault("matchLabels", {}).update(pairs)
            for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution", []):
                term["labelSelector"].setdefault("matchLabels", {}).update(pairs)
            for spread in spec["template"]["spec"].get("topologySpreadConstraints", []):
                spread["labelSelector"].setdefault("matchLabels", {}).update(pairs)
        if kind == "PodDisruptionBudget":
            spec["selector"].setdefault("matchLabels", {}).update(pairs)
        if kind == "NetworkPolicy":
            # Only where there are labels already; and in the peers too.
            if "matchLabels" in spec["podSelector"]:
                spec["podSelector"]["matchLabels"].update(pairs)
            for rule in spec.get("ingress", []) + spec.get("egress", []):
                for peer in rule.get("from", []) + rule.get("to", []):
                    if "podSelector" in peer:
                        peer["podSelector"].setdefault("matchLabels", {}).update(pairs)


def apply_patch(objects, directory, patch):
    text = patch["patch"] if "patch" in patch else (directory / patch["path"]).read_text()
    content = yaml.safe_load(text)
    if isinstance(content, list):
        target = patch["target"]
        hit = [o for o in objects if o["kind"] == target["kind"]
               and target.get("name", o["metadata"]["name"]) == o["metadata"]["name"]]
        assert hit, f"{directory}: a patch for {target} meets nothing"
        for found in hit:
            for step in content:
                json_patch(found, step)
        return
    same = [o for o in objects if o["kind"] == content["kind"]
            and o["metadata"]["name"] == content["metadata"]["name"]]
    assert len(same) == 1, f"{directory}: a patch for {content['metadata']} meets {len(same)}"
    merge(same[0], content)


def json_patch(found, step):
    *parents, last = [part.replace("~1", "/") for part in step["path"].split("/")[1:]]
    at = found
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    value = copy.deepcopy(step.get("value"))
    if isinstance(at, list):
        if step["op"] == "add":
            at.insert(len(at) if last == "-" else int(last), value)
        else:
            assert step["op"] == "replace", step
            at[int(last)] = value
        return
    assert step["op"] == "add" or last in at, f"{step['path']} is not there"
    if step["op"] == "remove":
        del at[last]
    else:
        at[last] = value


def merge(base, patch):
    """Strategic merge of maps; a list replaces a list, and must not stand where one would join."""
    for key, value in patch.items():
        if value is None:
            base.pop(key, None)
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            assert not (isinstance(value, list) and base.get(key)), f"lists of {key} join"
            base[key] = copy.deepcopy(value)


def real_kustomize(directory):
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, str(directory)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return [d for d in yaml.safe_load_all(done.stdout) if d]
    return None


# --- what must hold

def label_of(selector):
    return (selector.get("matchLabels") or selector).get(COMPONENT)


def find(objects, kind, name):
    return next((o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name), None)


def schemas(objects, version):
    for found in objects:
        name = f"{found['kind']} {found['metadata']['name']}"
        try:
            kubernetes_validate.validate(found, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{name}: by the schemas of {version}: {error.message}"


def pods(objects, effective):
    for service in SERVICES:
        found = find(objects, "StatefulSet", service)
        if not found:
            yield f"no StatefulSet {service}"
            continue
        spec = found["spec"]
        pod = spec["template"]["spec"]
        container = pod["containers"][0]
        labels = spec["template"]["metadata"]["labels"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        if not spec["selector"]["matchLabels"].items() <= labels.items():
            yield f"{service}: its selector misses its own pods"
        if pod.get("enableServiceLinks") is not False:
            yield f"{service}: enableServiceLinks would set variables that are taken for settings"
        secure = pod["securityContext"]
        inner = container["securityContext"]
        if not (secure.get("runAsNonRoot") and inner.get("readOnlyRootFilesystem")
                and inner.get("allowPrivilegeEscalation") is False
                and inner.get("capabilities") == {"drop": ["ALL"]}
                and secure.get("seccompProfile") == {"type": "RuntimeDefault"}):
            yield f"{service}: its security context is not restricted"
        if not (container["resources"].get("requests") and container["resources"].get("limits")):
            yield f"{service}: no resources"
        if not spec.get("volumeClaimTemplates"):
            yield f"{service}: no volume for its data"
        budget = find(objects, "PodDisruptionBudget", service)
        if not budget or label_of(budget["spec"]["selector"]) != service:
            yield f"{service}: no PodDisruptionBudget"
        for probe in ("readinessProbe", "livenessProbe"):
            check = container.get(probe, {})
            if "exec" in check:
                continue
            port = next((c["port"] for c in check.values() if isinstance(c, dict)), None)
            if ports.get(port, port) not in ports.values():
                yield f"{service}: {probe} asks port {port}, which does not exist"
        yield from configured(service, pod, container, ports, effective, objects)
    names = [f"{c['name']}: {c['image']}" for c in containers(objects) if ":" not in c["image"]]
    yield from (f"{name} has no tag" for name in names)


def configured(service, pod, container, ports, effective, objects):
    args = [a.replace("$(POD_NAME)", f"{service}-0") for a in container["args"]]
    config, fault = effective(container["command"][0], args, container.get("env", []))
    if fault:
        yield f"{service}: the binary refuses its arguments: {fault}"
        return
    for key, port in (("listen", "grpc"), ("nbd_listen", "nbd"),
                      ("metrics_listen", "metrics")):
        if key in config and int(config[key].rsplit(":", 1)[1]) != ports.get(port):
            yield f"{service}: {key} is {config[key]}, but its port {port} is {ports.get(port)}"
    drain = config.get("drain_deadline_ms", config.get("drain_timeout_ms", 0))
    stop_s = (drain + config["server"]["drain_timeout_ms"]) / 1000
    if pod["terminationGracePeriodSeconds"] <= stop_s:
        yield f"{service}: killed after {pod['terminationGracePeriodSeconds']} s, stops in {stop_s} s"
    data = config.get("data_dir") or config.get("cache_dir")
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    if not data.startswith(mounts.get("data", "?") + "/"):
        yield f"{service}: {data} is not in its volume"
    for key in ("conversion", "advertise"):
        if key not in config:
            continue
        host, port = config[key].split("://")[1].split(":")
        target = find(objects, "Service", host.split(".")[-1])
        offered = [p["port"] for p in target["spec"]["ports"]] if target else []
        if int(port) not in offered:
            yield f"{service}: {key} is {config[key]}: no Service offers that"


def services(objects):
    for found in (o for o in objects if o["kind"] == "Service"):
        name = found["metadata"]["name"]
        behind = find(objects, "StatefulSet", label_of(found["spec"]["selector"]) or "")
        if not behind:
            yield f"Service {name} selects nothing"
            continue
        labels = behind["spec"]["template"]["metadata"]["labels"]
        if not found["spec"]["selector"].items() <= labels.items():
            yield f"Service {name} selects nothing"
        ports = {p["name"]: p["containerPort"]
                 for p in behind["spec"]["template"]["spec"]["containers"][0]["ports"]}
        for port in found["spec"]["ports"]:
            if ports.get(port["targetPort"]) != port["port"]:
                yield f"Service {name}: port {port['port']} leads to {port['targetPort']}"


def matches(selector, component):
    chosen = label_of(selector)
    for term in selector.get("matchExpressions", []):
        if term["key"] == COMPONENT and component not in term["values"]:
            return False
    return chosen in (None, component)


def peer_name(peer):
    pod = peer.get("podSelector", {})
    labels = pod.get("matchLabels", {})
    if labels.get("endio.io/client") == "true":
        return "client"
    if labels.get("k8s-app") == "kube-dns":
        return "dns"
    if labels.get("app.kubernetes.io/name") == "prometheus":
        return "prometheus"
    return labels.get(COMPONENT, "anybody")


def network(objects, arrows):
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
    sides = {"ingress": set(), "egress": set()}
    for service in SERVICES:
        mine = [p for p in policies if matches(p["podSelector"], service)]
        for side, direction in (("ingress", "Ingress"), ("egress", "Egress")):
            if not any(direction in p["policyTypes"] for p in mine):
                yield f"{service}: {side} is not restricted"
            for rule in (rule for p in mine for rule in p.get(side, [])):
                peers = rule.get("from" if side == "ingress" else "to") or [{}]
                ports = rule.get("ports") or [{"port": "any"}]
                for name in map(peer_name, peers):
                    pair = (name, service) if side == "ingress" else (service, name)
                    sides[side] |= {(*pair, port["port"]) for port in ports}
    for side, own in (("ingress", 1), ("egress", 0)):
        # Of an arrow from or to somebody outside there is only the end that is ours.
        wanted = {arrow for arrow in arrows if arrow[own] in SERVICES}
        for source, to, port in sorted(wanted - sides[side], key=str):
            yield f"no {side} policy for {source} -> {to}:{port}"
        for source, to, port in sorted(sides[side] - wanted, key=str):
            yield f"{side} policy for {source} -> {to}:{port}, which is no arrow"


def faults(objects, effective, version):
    yield from schemas(objects, version)
    yield from pods(objects, effective)
    yield from services(objects)
    yield from network(objects, ARROWS)


def asker(directory):
    asked = {}

    def effective(binary, args, env):
        key = json.dumps([binary, args])
        if key not in asked:
            done = subprocess.run([str(directory / binary), *args, "--check-config"],
                                  capture_output=True, text=True, timeout=60)
            asked[key] = ((tomllib.loads(done.stdout), None) if done.returncode == 0
                          else (None, done.stderr.strip()))
        return asked[key]

    return effective


# --- faults that must be found

def break_spec(kind, name, change):
    def planted(objects):
        change(find(objects, kind, name)["spec"])
    return planted


def container_of(spec):
    return spec["template"]["spec"]["containers"][0]


PLANTED = {
    "a policy that is missing": lambda objects: objects.remove(
        find(objects, "NetworkPolicy", "block-store-to-conversion")),
    "a policy of one side only": lambda objects: objects.remove(
        find(objects, "NetworkPolicy", "conversion-from-writeback")),
    "an arrow too many": break_spec("NetworkPolicy", "client-to-writeback", lambda spec: spec[
        "ingress"][0]["ports"].append({"port": 7401, "protocol": "TCP"})),
    "a policy that lets anybody in": break_spec("NetworkPolicy", "client-to-writeback", lambda s: s[
        "ingress"][0].pop("from")),
    "nothing denied": lambda objects: [objects.remove(o) for o in list(objects)
                                       if o["kind"] == "NetworkPolicy"],
    "a probe of a port that is not there": break_spec("StatefulSet", "writeback", lambda spec:
        container_of(spec)["readinessProbe"]["grpc"].update(port=7499)),
    "a port that nobody listens on": break_spec("StatefulSet", "conversion", lambda spec:
        container_of(spec)["args"].__setitem__(1, "--listen=0.0.0.0:7400")),
    "a flag that the binary does not know": break_spec("StatefulSet", "block-store", lambda spec:
        container_of(spec)["args"].append("--replicas=2")),
    "a value that the binary refuses": break_spec("StatefulSet", "block-store", lambda spec:
        container_of(spec)["args"].append("--capacity=4097")),
    "a pod that is killed while it drains": break_spec("StatefulSet", "writeback", lambda spec:
        spec["template"]["spec"].update(terminationGracePeriodSeconds=40)),
    "a field that Kubernetes does not know": break_spec("StatefulSet", "writeback", lambda spec:
        spec["template"]["spec"].update(securitycontext={})),
    "a root file system that can be written": break_spec("StatefulSet", "writeback", lambda spec:
        container_of(spec)["securityContext"].pop("readOnlyRootFilesystem")),
    "service links": break_spec("StatefulSet", "writeback", lambda spec:
        spec["template"]["spec"].pop("enableServiceLinks")),
    "a service that leads nowhere": break_spec("Service", "endio", lambda spec:
        spec["selector"].update({COMPONENT: "front"})),
    "a budget that is missing": lambda objects: objects.remove(
        find(objects, "PodDisruptionBudget", "conversion")),
    "a peer that does not exist": break_spec("StatefulSet", "block-store", lambda spec:
        container_of(spec)["args"].__setitem__(3, "--conversion=http://convert:7401")),
    "data outside of the volume": break_spec("StatefulSet", "conversion", lambda spec:
        container_of(spec)["args"].__setitem__(0, "--data-dir=/var/lib/endio/data")),
}


def main():
    effective = asker(pathlib.Path(sys.argv[1]).resolve())
    failed = False
    for overlay in sorted((ROOT / "k8s/overlays").iterdir()):
        objects = render(overlay)
        found = [f for version in VERSIONS for f in faults(objects, effective, version)]
        real = real_kustomize(overlay)
        if real is not None:
            key = lambda o: (o["kind"], o["metadata"]["name"])
            if sorted(real, key=key) != sorted(objects, key=key):
                found.append("kustomize renders something else than this script")
        compared = "also by kustomize" if real is not None else "kustomize is not installed"
        for fault in dict.fromkeys(found):
            failed = True
            print(f"FAIL {overlay.name}: {fault}")
        if not found:
            print(f"ok   {overlay.name}: {len(objects)} objects, Kubernetes {VERSIONS} ({compared})")
        for name, plant in PLANTED.items():
            broken = copy.deepcopy(objects)
            plant(broken)
            new = [f for f in faults(broken, effective, VERSIONS[-1]) if f not in found]
            if not new:
                failed = True
                print(f"FAIL {overlay.name}: planted and not found: {name}")
    if not failed:
        print(f"ok   {len(PLANTED)} planted faults are found in each overlay")
    sys.exit(failed)


main()
