"""KServe's resources: valid, and the runtime's exact command line answers V2."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from loading import ROOT, load

kube = load("tests/deploy/kube.py")
promql = load("tests/deploy/promql.py")
release = load("tests/deploy/test_release.py")

start, checkpoint = release.start, release.checkpoint

Object = dict[str, Any]


def read(name: str) -> Object:
    found: Object = yaml.safe_load((ROOT / "deploy/kserve" / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["servingruntime.yaml", "inferenceservice.yaml"])
def test_it_is_valid(name: str) -> None:
    kube.validate(read(name))
    broken = read(name) | {"spec": read(name)["spec"] | {"container": []}}
    with pytest.raises(jsonschema.ValidationError):
        kube.validate(broken)


def as_pod() -> Object:
    """What KServe makes of the runtime's parts of a pod, and the service's."""
    runtime, service = read("servingruntime.yaml")["spec"], read("inferenceservice.yaml")["spec"]
    spec = {name: runtime[name] for name in ("containers", "volumes")} | {
        name: service["predictor"][name]
        for name in (
            *("terminationGracePeriodSeconds", "automountServiceAccountToken"),
            *("enableServiceLinks", "securityContext"),
        )
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "sst2"}, "spec": spec}


def test_the_pod_is_valid_and_its_container_restricted() -> None:
    pod = as_pod()
    kubernetes_validate.validate(pod, kube.NEWEST, strict=True)
    kubernetes_validate.validate(pod, kube.OLDEST, strict=True)
    assert kube.offences(pod["spec"]) == []
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 5 + 30 + 5


def test_service_and_runtime_agree() -> None:
    runtime, service = read("servingruntime.yaml"), read("inferenceservice.yaml")
    predictor = service["spec"]["predictor"]
    model, (container,) = predictor["model"], runtime["spec"]["containers"]
    (supported,) = runtime["spec"]["supportedModelFormats"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] == {name: supported[name] for name in ("name", "version")}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert container["name"] == "kserve-container"  # the one that KServe looks for
    port = container["ports"][0]["containerPort"]
    assert f"--port={port}" in container["args"]
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == str(port)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port
    (metric,) = predictor["autoScaling"]["metrics"]
    query = metric["external"]["metric"]["query"]
    # `--served-model-name` is what the service is called.
    assert f'offramp_queue_layer_work{{model_name="{service["metadata"]["name"]}"}}' in query
    (series,) = promql.selectors(query)
    assert series.labels == {"model_name"}


def test_the_containers_command_answers_v2(
    checkpoint: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    (container,) = read("servingruntime.yaml")["spec"]["containers"]
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt/models").symlink_to(checkpoint)
    port = release.free_port()
    command, environment = release.command_of(container, tmp_path, port)
    # KServe fills in the service's name.
    command = [one.replace("{{.Name}}", "sst2") for one in command]
    process = start(command, environment)
    release.until(lambda: release.answers(port, process, "/v2/health/live"))
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container[probe]["httpGet"]["path"]
        release.until(lambda path=path: release.answers(port, process, path))
    status, content = release.ask(port, "GET", "/v2/models/sst2/ready")
    assert status == 200
    assert json.loads(release.ask(port, "GET", "/v2/models/sst2")[1])["name"] == "sst2"
    question = {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["w1 w2", "w3"]}],
        "parameters": {"speedup": 2},
        "outputs": [{"name": "label"}, {"name": "exit_layer"}],
    }
    status, content = release.ask(port, "POST", "/v2/models/sst2/infer", question)
    assert status == 200, content
    outputs = {one["name"]: one for one in json.loads(content)["outputs"]}
    assert outputs["label"]["shape"] == [2]
    assert set(outputs["label"]["data"]) <= set(release.support.LABELS)
    assert all(1 <= layer <= 4 for layer in outputs["exit_layer"]["data"])
    status, content = release.ask(
        port, "POST", "/v1/models/sst2:predict", {"instances": ["w1 w2", "w3"]}
    )
    assert status == 200, content
    assert len(json.loads(content)["predictions"]) == 2
    assert b"offramp_queue_layer_work" in release.ask(port, "GET", "/metrics")[1]
