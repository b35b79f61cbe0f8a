"""A release without a cluster: the container's own command line and environment, its files laid out
on this machine, its probes, its metrics, its keys, the pod of `helm test`, and its end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from loading import load

kube = load("tests/deploy/kube.py")
support = load("tests/unit/service/support.py")

Object = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = support.write_tiny_checkpoint(tmp_path_factory.mktemp("release") / "tiny")
    return directory


def command_of(container: Object, root: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a server's container, for this machine: its directories below
    `root`, and on loopback."""
    assert container["command"] == ["offramp-serve"]
    own = str(container["ports"][0]["containerPort"])
    arguments = [
        kube.moved(one, root)
        .replace("--hostname=0.0.0.0", "--hostname=127.0.0.1")
        .replace("--hostname=::", "--hostname=127.0.0.1")
        .replace(f"--port={own}", f"--port={port}")
        for one in container["args"]
    ]
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    for variable in container["env"]:
        source = variable.get("valueFrom", {}).get("resourceFieldRef")
        value = container["resources"]["requests"]["cpu"] if source else variable["value"]
        environment[variable["name"]] = value
    return [sys.executable, "-m", "offramp_service", *arguments], environment


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def ask(
    port: int, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def run(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate(timeout=10)


def answers(port: int, process: subprocess.Popen[str], path: str) -> bool:
    assert process.poll() is None, process.communicate(timeout=10)
    try:
        return ask(port, "GET", path)[0] == 200
    except ConnectionRefusedError:
        return False


def write_secret(folder: Path, generation: int, keys: str) -> None:
    """As the kubelet does: the files in a directory of their own, to which a link is turned."""
    version = folder / f"..{generation}"
    version.mkdir(parents=True)
    (version / "keys").write_text(keys, encoding="utf-8")
    (folder / "..next").symlink_to(version.name)
    (folder / "..next").rename(folder / "..data")
    if not (folder / "keys").is_symlink():
        (folder / "keys").symlink_to("..data/keys")


def run_smoke(release: Object, port: int, key: str | None, root: Path) -> tuple[int, str]:
    """The pod of `helm test`."""
    (pod,) = release["objects"]["tests/smoke.yaml"]
    (container,) = pod["spec"]["containers"]
    (scripts,) = release["objects"]["scripts.yaml"]
    script = root / "smoke.py"
    script.write_text(scripts["data"]["smoke.py"], encoding="utf-8")
    assert container["command"] == ["python3", "-I", "/etc/offramp/scripts/smoke.py"]
    url, *others = container["args"]
    assert url == "http://offramp:80"
    done = subprocess.run(
        [sys.executable, "-I", script, f"http://127.0.0.1:{port}", *others],
        capture_output=True,
        text=True,
        timeout=50,
        env={} if key is None else {"API_KEY": key + "\n"},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_release_from_start_to_end(
    checkpoint: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(
        json.dumps(
            {
                "models": [
                    {"name": "tiny", "existingClaim": {"name": "checkpoints", "path": "tiny"}},
                    {"name": "other", "copy": {"image": "models/tiny:1", "path": "/checkpoint"}},
                ],
                "config": {"drain_seconds": 0.2, "shutdown_timeout": 5},
                "apiKeys": {"existingSecret": "keys"},
            }
        ),
        encoding="utf-8",
    )
    (release,) = kube.render(values)
    root = tmp_path / "root"
    kube.lay_out_config(release, root)
    write_secret(root / "etc/offramp/keys", 1, "# of the first team\nsesame\n")
    shutil.copytree(checkpoint, root / "models/claims/checkpoints/tiny")
    shutil.copytree(checkpoint, root / "models/fetched/other")

    pod = kube.only(release, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    port = free_port()
    command, environment = command_of(container, root, port)
    # What the image presets, and the file is to decide: here, the other way round.
    environment = {"PORT": "3999"} | environment | {"THREADS": "1"}
    process = start(command, environment)
    until(lambda: answers(port, process, container["startupProbe"]["httpGet"]["path"]))
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert ask(port, "GET", container[probe]["httpGet"]["path"])[0] == 200

    assert ask(port, "GET", "/metrics")[0] == 401
    status, metrics = ask(port, "GET", "/metrics", authorization="Bearer sesame")
    assert status == 200
    for name in ("tiny", "other"):
        for signal_of_load in ("offramp_queue_layer_work", "offramp_engine_busy_seconds_total"):
            assert f'\n{signal_of_load}{{model_name="{name}"'.encode() in metrics

    code, said = run_smoke(release, port, "sesame", tmp_path)
    assert code == 0, said
    assert "tiny: " in said
    assert "other: " in said
    code, said = run_smoke(release, port, None, tmp_path)
    assert code != 0
    assert "401" in said

    write_secret(root / "etc/offramp/keys", 2, "sesame\nparsley\n")
    until(lambda: run_smoke(release, port, "parsley", tmp_path)[0] == 0)
    write_secret(root / "etc/offramp/keys", 3, "parsley\n")
    until(lambda: ask(port, "GET", "/info", authorization="Bearer sesame")[0] == 401)
    assert ask(port, "GET", "/info", authorization="Bearer parsley")[0] == 200

    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert time.monotonic() - began < pod["terminationGracePeriodSeconds"]
    assert process.stderr is not None
    log = process.stderr.read()
    assert '"message"' in log  # json_output: true, of the file
    assert "sesame" not in log
    assert "parsley" not in log


def test_a_dry_run_of_everything(
    rendered: dict[str, Object], checkpoint: Path, tmp_path: Path
) -> None:
    """The service opens what the values name, and takes every setting for this checkpoint."""
    release = rendered["everything"]
    kube.lay_out_config(release, tmp_path)
    write_secret(tmp_path / "etc/offramp/keys", 1, "sesame\n")
    (tmp_path / "etc/offramp/keys/admin").write_text("parsley\n", encoding="utf-8")
    for place in ("claims/checkpoints/sst2", "fetched/intent.v2", "fetched/spam", "images/topics"):
        shutil.copytree(checkpoint, tmp_path / "models" / place)
    (container,) = kube.only(release, "Deployment")["spec"]["template"]["spec"]["containers"]
    # What is only in some environments: traces.
    command, environment = command_of(container, tmp_path, 3000)
    done = subprocess.run(
        [*command, "--dry-run"], capture_output=True, text=True, timeout=50, env=environment
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    names = [served["served_model_name"] for served in plan["serves"]]
    assert names == ["sst2", "intent.v2", "spam", "topics"]
    assert plan["settings"]["json_output"] is False
    assert plan["settings"]["otlp_endpoint"] == "http://collector.monitoring:4318"
