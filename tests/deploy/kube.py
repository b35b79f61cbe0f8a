"""What tests of manifests have in common: rendering the chart, validating objects, and the rules
that a pod of the restricted standard follows. Knows no test framework."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from loading import ROOT

CHART = ROOT / "deploy/helm/offramp"
NEWEST, OLDEST = "1.37", "1.27"
FOREIGN = yaml.safe_load((Path(__file__).parent / "foreign.yaml").read_text(encoding="utf-8"))

Object = dict[str, Any]


def chart(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`scripts/chart.py` as a process of its own: Helm is a library with a run time of its own."""
    command = [sys.executable, ROOT / "scripts/chart.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)


def render(*files: Path) -> list[Object]:
    """For each file of values `objects` by template, and `notes`."""
    done = chart("render", *files)
    assert done.returncode == 0, done.stderr
    rendered: list[Object] = json.loads(done.stdout)
    return rendered


_ATTEMPTS = """
import json, sys
import chart
said = []
for values in json.load(sys.stdin):
    try:
        said.append([chart.render(values), None])
    except Exception as error:
        said.append([None, str(error)])
print(json.dumps(said))
"""


def attempts(many: list[Object]) -> list[tuple[Object | None, str | None]]:
    """For each of these values what is rendered, or why it is not; all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", _ATTEMPTS],
        capture_output=True,
        text=True,
        timeout=50,
        input=json.dumps(many),
        cwd=ROOT / "scripts",
    )
    assert done.returncode == 0, done.stderr
    return [(rendered, said) for rendered, said in json.loads(done.stdout)]


def objects_of(rendered: Object) -> list[Object]:
    return [one for documents in rendered["objects"].values() for one in documents]


def only(rendered: Object, kind: str) -> Object:
    (found,) = [one for one in objects_of(rendered) if one["kind"] == kind]
    return found


def validate(one: Object, version: str = NEWEST) -> None:
    """Raises where the object is none that Kubernetes, or its operator, knows; an unknown field is
    an error."""
    kind = one["kind"]
    if kind in FOREIGN:
        schema = {"$defs": FOREIGN["$defs"]} | FOREIGN[kind]
        jsonschema.validate(one, schema, cls=jsonschema.Draft202012Validator)
    else:
        kubernetes_validate.validate(one, version, strict=True)


# -- pods ------------------------------------------------------------------------------------


def pods_of(objects: list[Object]) -> dict[str, Object]:
    """Specs of all pods that the objects would make, by the object's kind and name."""
    specs = {}
    for one in objects:
        name = f"{one['kind']} {one['metadata']['name']}"
        if one["kind"] == "Deployment":
            specs[name] = one["spec"]["template"]["spec"]
        elif one["kind"] == "Pod":
            specs[name] = one["spec"]
    return specs


def containers_of(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


# Sources of volumes that the restricted standard admits.
_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image"),
    *("persistentVolumeClaim", "projected", "secret"),
}


def offences(pod: Object) -> list[str]:
    """Where a pod is outside Kubernetes' restricted standard, field by field; and, besides, what
    offramp promises of its pods."""
    return [*_pod_offences(pod), *(one for c in containers_of(pod) for one in _offences_of(c, pod))]


def _pod_offences(pod: Object) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    if pod.get("hostUsers") is True:
        yield "hostUsers"
    for volume in pod.get("volumes", []):
        if not volume.keys() - {"name"} <= _VOLUMES:
            yield f"volume {volume['name']}"
    security = pod.get("securityContext", {})
    for field in ("sysctls", "seLinuxOptions", "windowsOptions", "appArmorProfile"):
        if field in security:
            yield f"securityContext.{field}"
    # offramp's own
    if pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken"
    if pod.get("enableServiceLinks") is not False:
        yield "enableServiceLinks"
    if security.get("fsGroup") != 10001:
        yield "fsGroup"


def _offences_of(container: Object, pod: Object) -> Iterator[str]:
    own, whole = container.get("securityContext", {}), pod.get("securityContext", {})
    both = whole | own
    wrong = {
        "privileged": own.get("privileged", False) is not False,
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
        "runAsNonRoot": both.get("runAsNonRoot") is not True,
        "runAsUser": both.get("runAsUser") == 0,
        "capabilities.drop": own.get("capabilities", {}).get("drop") != ["ALL"],
        "capabilities.add": bool(own.get("capabilities", {}).get("add")),
        "seccompProfile": both.get("seccompProfile", {}).get("type")
        not in ("RuntimeDefault", "Localhost"),
        "procMount": own.get("procMount", "Default") != "Default",
        "ports.hostPort": any("hostPort" in port for port in container.get("ports", [])),
        "probes name a host": any(
            "host" in handler
            for probe in ("startupProbe", "readinessProbe", "livenessProbe")
            for handler in container.get(probe, {}).values()
            if isinstance(handler, dict)
        ),
        # offramp's own
        "uid is not 10001": both.get("runAsUser") != 10001,
        "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is not True,
        "no limit of memory": "memory" not in container.get("resources", {}).get("limits", {}),
        "no request": not {"cpu", "memory"}
        <= container.get("resources", {}).get("requests", {}).keys(),
        "lifecycle": "lifecycle" in container,
    }
    yield from (f"{container['name']}: {field}" for field, is_wrong in wrong.items() if is_wrong)


# -- a container's own files, laid out for a process on this machine -------------------------


def moved(text: str, root: Path) -> str:
    """A path, or a text with paths, with the container's directories below `root`."""
    return re.sub(r"/(?=(etc/offramp|models/|mnt/models)\b)", f"{root}/", text)


def lay_out_config(rendered: Object, root: Path) -> Path:
    """The file of --config where the container has it."""
    (config,) = rendered["objects"]["configmap.yaml"]
    path = root / "etc/offramp/config/offramp.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(moved(config["data"]["offramp.yaml"], root), encoding="utf-8")
    return path
