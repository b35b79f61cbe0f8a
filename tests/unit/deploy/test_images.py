"""Dockerfile, compose file and the small programs of the images, without building anything."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from loading import ROOT, load

DOCKERFILE = ROOT / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"
SERVING = ("offramp", "offramp-gpu")
requirements = load("deploy/docker/requirements.py").requirements
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offramp-e2e"


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def compose_command() -> list[str] | None:
    """As a plugin of the client, or the plugin that `make install-e2e` keeps, by itself."""
    client = shutil.which("docker")
    if (
        client
        and not subprocess.run([client, "compose", "version"], capture_output=True).returncode
    ):
        return [client, "compose"]
    kept = CACHE / "cli-plugins" / "docker-compose"
    return [str(kept)] if kept.exists() else None


def resolved(*options: str, **environment: str) -> dict[str, Any]:
    """The compose file as compose reads it."""
    command = compose_command()
    if command is None:
        pytest.skip("no docker client with compose: make install-e2e")
    done = subprocess.run(
        [*command, "--file", COMPOSE, *options, "config", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_compose_reads_its_file() -> None:
    assert sorted(resolved()["services"]) == [
        *("alertmanager", "grafana", "offramp", "prometheus", "trainer")
    ]
    everything = resolved(
        "--profile", "gpu", "--profile", "load", API_KEY="sesame", OFFRAMP_CPUS="3"
    )
    services = everything["services"]
    assert {"load", "offramp-gpu"} < set(services)
    assert services["offramp"]["environment"]["API_KEY"] == "sesame"
    assert services["offramp"]["deploy"]["resources"]["limits"]["cpus"] == 3
    (device,) = services["offramp-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert services["offramp-gpu"]["tmpfs"] == ["/tmp:size=1g,mode=1777,exec"]


def services() -> dict[str, Any]:
    """As written, merge keys followed."""
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


@pytest.mark.parametrize("name", sorted(services()))
def test_every_service_is_hardened_and_limited(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")
    if not service["image"].startswith("offramp:"):
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])


@pytest.mark.parametrize("name", SERVING)
def test_the_grace_period_is_longer_than_a_drain(name: str) -> None:
    service = services()[name]
    drain = [
        int(re.fullmatch(r"\$\{\w+:-(\d+)\}", service["environment"][variable])[1])  # type: ignore[index]
        for variable in ("DRAIN_SECONDS", "SHUTDOWN_TIMEOUT")
    ]
    assert int(service["stop_grace_period"].removesuffix("s")) > sum(drain) + 2


def test_settings_in_the_files_are_settings_of_the_server(tmp_path: Path) -> None:
    """An environment variable that nobody reads is a mistake that nobody sees."""
    from offramp_service.settings import Settings

    known = {name.upper() for name in Settings.model_fields}
    for name in SERVING:
        assert set(services()[name]["environment"]) <= known
    # In the Dockerfile: those beside what Python and other libraries read.
    text = DOCKERFILE.read_text()
    assert {"PORT", "JSON_OUTPUT"} <= known
    assert text.count("PORT=3000 JSON_OUTPUT=true") == text.count("EXPOSE 3000") == 2


def test_labels_and_bases_are_pinned() -> None:
    text = DOCKERFILE.read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert set(re.findall(r"^ARG VERSION=(\S+)$", text, re.MULTILINE)) == {version}
    for image in re.findall(r"^ARG \w+_IMAGE=(\S+)$", text, re.MULTILINE):
        assert re.search(r":\d+\.\d+\.\d+-", image), image
    stages = r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)"
    targets = dict(re.findall(stages, text, re.MULTILINE | re.DOTALL))
    for name in ("cpu", "gpu", "trainer"):
        assert "\nUSER 10001:10001\n" in targets[name]
        assert 'image.licenses="Apache-2.0"' in targets[name]
        assert ("HEALTHCHECK" in targets[name]) is (name != "trainer")


def test_the_build_sees_sources_and_nothing_that_grows() -> None:
    rules = [
        one for one in (ROOT / ".dockerignore").read_text().splitlines() if one[:1] not in ("", "#")
    ]
    assert rules[0] == "*"
    copied = re.findall(
        r"^COPY (?!--from)(?:--chmod=\d+ )?(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE
    )
    allowed = [one.removeprefix("!") for one in rules if one.startswith("!")]
    for path in " ".join(copied).split():
        assert (ROOT / path).exists(), path
        assert any(
            f"{path}/".startswith(f"{one}/") or one.startswith(f"{path}/") for one in allowed
        ), path


def test_installing_what_the_stack_test_needs_takes_root() -> None:
    nobody = 65534
    done = subprocess.run(
        ["sh", ROOT / "scripts/install-e2e.sh"],
        capture_output=True,
        text=True,
        check=False,
        user=nobody if os.geteuid() == 0 else None,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )
    assert done.returncode == 1
    # Where this is not Debian, that is the reason.
    assert re.fullmatch(r"install-e2e: (needs root|this is for Debian).*\n", done.stderr)


PROJECT = {
    "dependencies": ["numpy>=2.0"],
    "optional-dependencies": {"serve": ["uvicorn[standard]>=0.35"], "onnx": ["onnxruntime>=1.23"]},
}


def test_requirements_are_those_of_the_extras() -> None:
    assert requirements(PROJECT, ["serve", "onnx"], {"onnxruntime": "onnxruntime-gpu"}) == [
        *("numpy>=2.0", "uvicorn[standard]>=0.35", "onnxruntime-gpu>=1.23")
    ]
    with pytest.raises(SystemExit, match=r"no extra gpu; there are: onnx, serve"):
        requirements(PROJECT, ["gpu"], {})
    with pytest.raises(SystemExit, match=r"nothing to replace: onnxruntime is not required"):
        requirements(PROJECT, ["serve"], {"onnxruntime": "onnxruntime-gpu"})


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server whose every page has that status."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()
            self.wfile.write(b'{"phase": "draining"}')

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def check(port: int) -> tuple[int, str]:
    """What HEALTHCHECK runs, with the words of the Dockerfile."""
    words = json.loads(re.findall(r"^    CMD (\[.*\])$", DOCKERFILE.read_text(), re.MULTILINE)[-1])
    assert words[0] == "python3"
    words[0], words[-1] = sys.executable, str(ROOT / "deploy/docker" / Path(words[-1]).name)
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={"PORT": str(port)}, timeout=20
    )
    return done.returncode, done.stdout


def test_the_health_check_asks_whether_the_server_is_ready() -> None:
    with answering(200) as port:
        assert check(port)[0] == 0
    with answering(503) as port:
        assert check(port) == (1, '503 {"phase": "draining"}')
    code, said = check(port)  # nobody is there any more
    assert code == 1
    assert said.startswith(f"port {port}: ")
