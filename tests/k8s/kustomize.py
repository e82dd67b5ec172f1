"""The part of kustomize that the overlays use; what it does not know is an error."""

import copy
import shutil
import subprocess

import yaml

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
