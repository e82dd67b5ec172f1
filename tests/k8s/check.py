"""Checks the manifests of k8s/ without a cluster.

    tests/k8s/run.sh DIRECTORY-OF-BINARIES

* Each overlay is rendered: by the part of kustomize that it uses (kustomize.py); what the part does not
  know is an error. Where `kustomize` or `kubectl` is installed, both must render the same.
* Each object is valid by the schemas of Kubernetes, and nothing in it is unknown to them.
* The binaries take the arguments of the manifests (`--check-config`), listen where probes, services
  and policies point, and their deadlines for a stop end before the pod is killed.
* Each pod has a certificate of its own kind, for the names under which it is reached, and the probe can
  show one; the Secrets are those of k8s/pki.sh, which is run, and of k8s/components/cert-manager.
* The network policies allow the arrows of ARCHITECTURE.md, and nothing else.
* Each of these checks finds a fault that is planted.
"""

import base64
import copy
import functools
import json
import os
import pathlib
import re
import ssl
import subprocess
import sys
import tempfile
import tomllib

import kubernetes_validate
import yaml

from kustomize import containers, real_kustomize, render

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
# Names under which clients and peers reach pods; a store's is the one that it advertises.
REACHED_AS = {"conversion": {"conversion"}, "writeback": {"endio", "writeback"}}
PROBED_AT = "127.0.0.1"
# Files that a service reads in its directory, and their keys in a Secret of type kubernetes.io/tls.
TLS_FILES = {"ca.pem": "ca.crt", "cert.pem": "tls.crt", "key.pem": "tls.key"}


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
                port = int(check["exec"]["command"][-1].rsplit(":", 1)[1])
            else:
                port = next((c["port"] for c in check.values() if isinstance(c, dict)), None)
            if ports.get(port, port) not in ports.values():
                yield f"{service}: {probe} asks port {port}, which does not exist"
        yield from configured(service, pod, container, ports, effective, objects)
    names = [f"{c['name']}: {c['image']}" for c in containers(objects) if ":" not in c["image"]]
    yield from (f"{name} has no tag" for name in names)


def configured(service, pod, container, ports, effective, objects):
    config, fault = effective(container, f"{service}-0")
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
        scheme, host, port = re.split("://|:", config[key])
        if scheme != "https":
            yield f"{service}: {key} is {config[key]}, which is not secured"
        target = find(objects, "Service", host.split(".")[-1])
        offered = [p["port"] for p in target["spec"]["ports"]] if target else []
        if int(port) not in offered:
            yield f"{service}: {key} is {config[key]}: no Service offers that"


def certificates(objects, effective, holders):
    """`holders`: for each way to make Secrets, the certificate in each of them."""
    for service in SERVICES:
        spec = (find(objects, "StatefulSet", service) or {"spec": {"replicas": 0}})["spec"]
        for number in range(spec["replicas"]):
            name = f"{service}-{number}"
            pod = spec["template"]["spec"]
            config, fault = effective(pod["containers"][0], name)
            directory = None if fault else config["tls"].get("dir")
            if not directory:
                yield f"{name}: works without TLS"
                continue
            reached = REACHED_AS.get(service) or {re.split("://|:", config["advertise"])[1]}
            yield from probe(name, pod["containers"][0], directory)
            secret, found = secret_of(pod, directory)
            yield from (f"{name}: {fault}" for fault in found)
            for maker, made in holders.items():
                if secret not in made:
                    yield f"{name}: {maker} makes no Secret {secret}"
                    continue
                has = made[secret]
                if not any(uri.startswith(f"endio://service/{service}/") for uri in has):
                    yield f"{name}: the Secret {secret} of {maker} is for {sorted(has)}"
                if missing := (reached | {PROBED_AT}) - has:
                    yield f"{name}: the Secret {secret} of {maker} is not for {sorted(missing)}"


def probe(name, container, directory):
    env = {e["name"]: e.get("value", "").replace("$(POD_NAME)", name) for e in container["env"]}
    command = container["readinessProbe"].get("exec", {}).get("command", [])
    if command[:1] != ["endio"] or not command[-1].startswith(f"https://{PROBED_AT}:"):
        yield f"{name}: the readiness probe {command} shows no certificate"
    if env.get("ENDIO_TLS_DIR") != directory:
        yield f"{name}: the endio command does not find the certificate in {directory}"


def secret_of(pod, directory):
    """The Secret that fills the directory, and what is wrong with it."""
    mount = next((m for m in pod["containers"][0]["volumeMounts"]
                  if directory.startswith(m["mountPath"])), None)
    volume = next((v for v in pod["volumes"] if mount and v["name"] == mount["name"]), None)
    if not volume or not mount.get("readOnly"):
        return None, [f"{directory} is not mounted, or not read-only"]
    source = volume.get("secret") or volume.get("projected") or {}
    secrets = [s["secret"] for s in source.get("sources", [{"secret": source}])]
    below = directory.removeprefix(mount["mountPath"]).strip("/")
    files = {i["path"]: (s.get("name") or s.get("secretName"), i["key"])
             for s in secrets for i in s.get("items", [])}
    found = {name: files.get(f"{below}/{name}".strip("/"), (None, None)) for name in TLS_FILES}
    names = {secret for secret, _ in found.values()}
    wrong = []
    if {name: key for name, (_, key) in found.items()} != TLS_FILES or len(names) != 1:
        wrong.append(f"{directory} is filled with {found}")
    if source.get("defaultMode", 0o644) & 0o007:
        wrong.append("everybody may read the key")
    return next(iter(names)), wrong


def issued_by_cert_manager():
    component = render(ROOT / "k8s/components/cert-manager")
    specs = [o["spec"] for o in component if o["kind"] == "Certificate"]
    return {s["secretName"]: set(s.get("uris", []) + s.get("dnsNames", [])
                                 + s.get("ipAddresses", [])) for s in specs}


def issued_by_script(binaries):
    """Runs k8s/pki.sh. The Secrets, and the names in each certificate."""
    with tempfile.TemporaryDirectory() as work:
        env = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
        done = subprocess.run([ROOT / "k8s/pki.sh", f"{work}/pki"], env=env, check=True,
                              stdout=subprocess.PIPE, text=True, timeout=120)
        secrets = [d for d in yaml.safe_load_all(done.stdout) if d]
        names = {}
        for secret in secrets:
            path = pathlib.Path(work, "certificate.pem")
            path.write_bytes(base64.b64decode(secret["data"]["tls.crt"]))
            # The standard library has no public way to read a certificate that nobody shows.
            told = ssl._ssl._test_decode_cert(path)["subjectAltName"]
            names[secret["metadata"]["name"]] = {value for _, value in told}
        return secrets, names


def the_probe_works(binaries, objects, secrets):
    """Starts conversion with what its pod would find, and asks it as its pod would be asked."""
    pod = find(objects, "StatefulSet", "conversion")["spec"]["template"]["spec"]
    items = next(v for v in pod["volumes"] if v["name"] == "tls")["secret"]["items"]
    data = next(s for s in secrets if s["metadata"]["name"] == "conversion-tls")["data"]
    with tempfile.TemporaryDirectory() as work:
        for item in items:
            pathlib.Path(work, item["path"]).write_bytes(base64.b64decode(data[item["key"]]))
        service = subprocess.Popen(
            [binaries / "endio-conversion", "--data-dir", f"{work}/data", "--listen",
             f"{PROBED_AT}:0", "--tls-dir", work], stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True)
        try:
            url = json.loads(service.stdout.readline())["grpc"]
            command = pod["containers"][0]["readinessProbe"]["exec"]["command"]
            env = {**os.environ, "ENDIO_TLS_DIR": work}
            for _ in range(20):
                asked = subprocess.run([binaries / command[0], *command[1:-1], url], env=env,
                                       capture_output=True, text=True, timeout=60)
                if asked.returncode == 0:
                    return None
            return f"the probe of conversion says: {asked.stderr.strip()}"
        finally:
            service.kill()
            service.wait()


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


def faults(objects, effective, holders, version):
    yield from schemas(objects, version)
    yield from pods(objects, effective)
    yield from certificates(objects, effective, holders)
    yield from services(objects)
    yield from network(objects, ARROWS)


def asker(directory):
    """What a service makes of the arguments and the environment of its pod."""
    @functools.cache
    def ask(binary, args, env):
        done = subprocess.run([str(directory / binary), *args, "--check-config"], timeout=60,
                              capture_output=True, text=True, env={**os.environ, **dict(env)})
        return ((tomllib.loads(done.stdout), None) if done.returncode == 0
                else (None, done.stderr.strip()))

    def effective(container, pod):
        told = lambda text: text.replace("$(POD_NAME)", pod)
        env = ((e["name"], told(e["value"])) for e in container.get("env", []) if "value" in e)
        return ask(container["command"][0], tuple(map(told, container["args"])), tuple(env))

    return effective


# --- faults that must be found

def break_spec(kind, name, change):
    def planted(objects):
        change(find(objects, kind, name)["spec"])
    return planted


def container_of(spec):
    return spec["template"]["spec"]["containers"][0]


def volume_of(spec):
    return next(v for v in spec["template"]["spec"]["volumes"] if v["name"] == "tls")


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
        container_of(spec)["readinessProbe"]["exec"]["command"].__setitem__(
            -1, "https://127.0.0.1:7499")),
    "a probe without a certificate": break_spec("StatefulSet", "writeback", lambda spec:
        container_of(spec)["env"].pop(0)),
    "a probe by the kubelet": break_spec("StatefulSet", "conversion", lambda spec:
        container_of(spec).update(readinessProbe={"grpc": {"port": 7401}})),
    "a service without TLS": break_spec("StatefulSet", "conversion", lambda spec:
        container_of(spec)["args"].__setitem__(-1, "--insecure-any-address")),
    "a url without TLS": break_spec("StatefulSet", "writeback", lambda spec:
        container_of(spec)["args"].__setitem__(3, "--conversion=http://conversion:7401")),
    "a Secret that nobody makes": break_spec("StatefulSet", "conversion", lambda spec:
        volume_of(spec)["secret"].update(secretName="conversion")),
    "the certificate of another kind": break_spec("StatefulSet", "conversion", lambda spec:
        volume_of(spec)["secret"].update(secretName="writeback-tls")),
    "a certificate for another name": break_spec("StatefulSet", "block-store", lambda spec:
        container_of(spec)["args"].__setitem__(2, "--advertise=https://block-store:7402")),
    "a key that everybody reads": break_spec("StatefulSet", "block-store", lambda spec:
        volume_of(spec)["projected"].update(defaultMode=0o444)),
    "a key in place of a certificate": break_spec("StatefulSet", "writeback", lambda spec:
        volume_of(spec)["secret"]["items"][1].update(key="tls.key")),
    "a store without a certificate": break_spec("StatefulSet", "block-store", lambda spec:
        spec.update(replicas=4)),
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
        container_of(spec)["args"].__setitem__(3, "--conversion=https://convert:7401")),
    "data outside of the volume": break_spec("StatefulSet", "conversion", lambda spec:
        container_of(spec)["args"].__setitem__(0, "--data-dir=/var/lib/endio/data")),
}


def main():
    binaries = pathlib.Path(sys.argv[1]).resolve()
    effective = asker(binaries)
    secrets, made = issued_by_script(binaries)
    holders = {"k8s/pki.sh": made, "cert-manager": issued_by_cert_manager()}
    found = [f for version in VERSIONS for f in schemas(secrets, version)]
    if (ours := set(made)) != (theirs := set(holders["cert-manager"]) - {"endio-authority"}):
        found.append(f"k8s/pki.sh makes {sorted(ours)}, cert-manager {sorted(theirs)}")
    found += filter(None, [the_probe_works(
        binaries, render(ROOT / "k8s/overlays/dev"), secrets)])
    for fault in found:
        print(f"FAIL secrets: {fault}")
    if not found:
        print(f"ok   {len(secrets)} Secrets; the probe takes one")
    failed = bool(found)
    for overlay in sorted((ROOT / "k8s/overlays").iterdir()):
        objects = render(overlay)
        found = [f for version in VERSIONS for f in faults(objects, effective, holders, version)]
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
            new = [f for f in faults(broken, effective, holders, VERSIONS[-1]) if f not in found]
            if not new:
                failed = True
                print(f"FAIL {overlay.name}: planted and not found: {name}")
    if not failed:
        print(f"ok   {len(PLANTED)} planted faults are found in each overlay")
    sys.exit(failed)


main()
