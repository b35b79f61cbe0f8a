"""The plain manifests: what the chart renders, as a whole that kubectl can apply."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from loading import load

kube = load("tests/deploy/kube.py")
workshop = load("scripts/chart.py")

FOLDER: Path = workshop.MANIFESTS
# Written by hand.
HAND = {"kustomization.yaml", "namespace.yaml", "values.yaml"}


def read(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def test_they_are_what_the_chart_renders(tmp_path: Path) -> None:
    done = kube.chart("manifests", "--to", tmp_path)
    assert done.returncode == 0, done.stderr
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    there = {path.name: path for path in FOLDER.glob("*.yaml")}
    assert there.keys() - HAND == made.keys(), "make manifests"
    for name, content in made.items():
        assert there[name].read_text(encoding="utf-8") == content, f"{name}: make manifests"


def test_nothing_of_helm_is_left() -> None:
    for path in FOLDER.glob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
        assert not any("helm" in line.lower() for line in lines if "values.yaml" not in line), path


def test_kustomize_takes_all_of_them() -> None:
    (whole,) = read(FOLDER / "kustomization.yaml")
    assert set(whole["resources"]) == {path.name for path in FOLDER.glob("*.yaml")} - (
        HAND - {"namespace.yaml"}
    )
    (namespace,) = read(FOLDER / "namespace.yaml")
    assert namespace["metadata"]["name"] == whole["namespace"] == workshop.NAMESPACE
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_they_are_valid_and_restricted() -> None:
    names = (path for path in FOLDER.glob("*.yaml") if path.name not in HAND - {"namespace.yaml"})
    objects = [one for path in names for one in read(path)]
    for one in objects:
        kube.validate(one)
        kube.validate(one, kube.OLDEST)
    pods = kube.pods_of(objects)
    assert pods.keys() == {"Deployment offramp"}
    assert kube.offences(pods["Deployment offramp"]) == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_builds_them() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", FOLDER], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    objects = [one for one in yaml.safe_load_all(done.stdout) if one]
    assert len(objects) == 7
    for one in objects:
        kube.validate(one)
        if one["kind"] != "Namespace":
            assert one["metadata"]["namespace"] == "offramp"
    (deployment,) = [one for one in objects if one["kind"] == "Deployment"]
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "offramp:0.1.0-cpu"
