"""The images, built from the Dockerfile as it is, and the stack of the compose file, run by a
Docker engine of the test's own.

Where no registry answers, the base images are stand-ins made of Debian packages (`containers/`).
Everything happens in a temporary folder and in a network of its own, and is gone afterwards.
`make install-e2e` installs what this needs, `make e2e` runs it; each test leaves the stack as it
found it. E2E_JSON names a file for the figures.
"""

import asyncio
import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import yaml

from loading import ROOT, load

engines = load("tests/e2e/containers/engine.py")
stand_ins = load("tests/e2e/containers/stand_ins.py")
monitoring = load("tests/e2e/containers/monitoring.py")

PLUGIN = stand_ins.CACHE / "cli-plugins" / "docker-compose"
SNIPS = ROOT / "training" / "data" / "snips"
SERVER, PROMETHEUS, ALERTMANAGER = (f"http://127.0.0.1:{port}" for port in (3000, 9090, 9093))
MIB = 1024 * 1024

# A short run: what is shown here is the way to a checkpoint, not how good one is.
QUICKSTART_FIT = os.environ.get("QUICKSTART_FIT", "--set loop.max_train_rows=1500")


def _missing() -> str | None:
    """What is not there of what this needs."""
    if os.geteuid() != 0:
        return "it starts a Docker engine, which takes root"
    needed = (engines.DOCKERD, engines.DOCKER, *stand_ins.PROGRAMS, PLUGIN)
    absent = [str(program) for program in needed if not Path(program).exists()]
    return f"no {', '.join(absent)}: make install-e2e" if absent else None


MISSING = _missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.docker,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

T = TypeVar("T")


def until(question: Callable[[], T], what: str, *, seconds: float = 60) -> T:
    """The first answer that is not empty; a server that is not there yet has none."""
    deadline = time.monotonic() + seconds
    last: object = "no answer that counts"
    while True:
        try:
            if answer := question():
                return answer
        except (OSError, engines.CommandFailed) as error:
            last = error
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s ({last})"
        time.sleep(0.05)


def ask(url: str, body: object = None) -> Any:
    """The JSON that comes back; `OSError` for an error status."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


class Stack:
    """The compose project on a running engine."""

    def __init__(self, docker: Any, files: list[Path], figures: dict[str, Any]) -> None:
        self.docker, self.figures = docker, figures
        self._files = [word for file in files for word in ("--file", str(file))]

    def compose(self, *words: str, seconds: float = 120) -> str:
        return self.docker("compose", *self._files, *words, seconds=seconds, cwd=ROOT)

    def container(self, service: str) -> dict[str, Any]:
        return self.docker.inspect(self.compose("ps", "--all", "--quiet", service).strip())

    def health(self, service: str = "offramp") -> str:
        return self.container(service)["State"]["Health"]["Status"]

    def is_ready(self) -> bool:
        return ask(f"{SERVER}/readyz")["status"] == "ok"

    def wait_until_healthy(self) -> None:
        until(lambda: self.is_ready() and self.health() == "healthy", "healthy")

    def series(self, query: str) -> list[dict[str, Any]]:
        found = ask(f"{PROMETHEUS}/api/v1/query?query={urllib.request.quote(query)}")
        return found["data"]["result"]

    def firing(self) -> set[str]:
        alerts = ask(f"{ALERTMANAGER}/api/v2/alerts?active=true")
        return {alert["labels"]["alertname"] for alert in alerts}


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, Any]]:
    """What was measured on the way."""
    found: dict[str, Any] = {}
    began = time.perf_counter()
    yield found
    found["all_seconds"] = round(time.perf_counter() - began, 1)
    sys.stdout.write(f"\n{json.dumps(found, indent=1)}\n")
    if name := os.environ.get("E2E_JSON"):
        Path(name).write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A short name: paths of sockets have 107 characters at most."""
    path = Path(tempfile.mkdtemp(prefix="e2e-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def built(folder: Path, figures: dict[str, Any]) -> Path:
    """Where the engine has the images."""
    config = folder / "config"
    (config / "cli-plugins").mkdir(parents=True)
    shutil.copy(PLUGIN, config / "cli-plugins")
    with engines.engine(folder / "engine", config, networks=False) as docker:
        _build(docker, folder, figures)
    return config


def _build(docker: Any, folder: Path, figures: dict[str, Any]) -> None:
    seconds, sizes = figures.setdefault("build_s", {}), figures.setdefault("image_mib", {})
    began = time.perf_counter()
    archive = stand_ins.debian_with_python()
    docker("import", archive, "debian-with-python")
    base = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert base is not None
    source = stand_ins.PackageSource()
    base_folder = folder / "base"
    stand_ins.write_base(base_folder, source.configuration, image="debian-with-python")
    docker.build(base_folder, base[1])
    seconds["stand-in base"] = round(time.perf_counter() - began, 1)
    with source.offered():
        for target in ("cpu", "trainer"):
            took = docker.build(
                *(ROOT, f"offramp:{target}", f"--target={target}"),
                # What does not answer here need not be asked six times.
                *("--build-arg=PIP_RETRIES=0", "--build-arg=REVISION=under-test"),
            )
            seconds[target] = round(took, 1)
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, write in (
        ("prometheus", stand_ins.write_prometheus),
        ("alertmanager", stand_ins.write_alertmanager),
    ):
        write(folder / name, base=base[1])
        docker.build(folder / name, services[name]["image"])
    for image in (base[1], "offramp:cpu", "offramp:trainer"):
        sizes[image] = round(docker.inspect(image)["Size"] / MIB, 1)


@pytest.fixture(scope="module")
def stack(folder: Path, built: Path, figures: dict[str, Any]) -> Iterator[Stack]:
    """The stack, up and healthy."""
    override = monitoring.hurried(ROOT / "deploy", folder / "monitoring")
    with engines.own_network(), engines.engine(folder / "engine", built, networks=True) as docker:
        docker.environment["QUICKSTART_FIT"] = QUICKSTART_FIT
        stack = Stack(docker, [ROOT / "docker-compose.yml", override], figures)
        try:
            _start(stack)
            yield stack
        except BaseException:
            with contextlib.suppress(engines.CommandFailed):
                sys.stdout.write(stack.compose("logs", "--no-color", "--tail=60"))
            raise
        finally:
            with contextlib.suppress(engines.CommandFailed):
                stack.compose("down", "--volumes", "--timeout=10")


def _start(stack: Stack) -> None:
    figures = stack.figures
    began = time.perf_counter()
    stack.compose("run", "--rm", "--no-deps", "trainer", seconds=600)
    figures["quickstart_model_s"] = round(time.perf_counter() - began, 1)
    began = time.perf_counter()
    stack.compose("up", "--detach", "--no-build", "offramp", "prometheus", "alertmanager")
    figures["up_s"] = round(time.perf_counter() - began, 1)
    began = time.perf_counter()
    until(stack.is_ready, "ready")
    figures["up_to_ready_s"] = round(time.perf_counter() - began, 2)
    until(lambda: stack.health() == "healthy", "healthy")
    figures["up_to_healthy_s"] = round(time.perf_counter() - began, 2)


def rows(count: int) -> list[tuple[str, str]]:
    """Texts of the test split and their labels."""
    names = json.loads((SNIPS / "dataset_info.json").read_text())["label_names"]
    with gzip.open(SNIPS / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        read = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    return [(row["text"], names[row["label"]]) for row in read]


def labels_at_all_doors(texts: list[str], speedup: float) -> list[list[str]]:
    """For each door the labels of the texts."""
    inputs, controls = [[text] for text in texts], {"speedup": speedup}
    tei = ask(f"{SERVER}/predict", {"inputs": inputs, "parameters": controls})
    vllm = ask(f"{SERVER}/classify", {"input": texts, **controls})
    text = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}
    v2 = ask(
        f"{SERVER}/v2/models/snips/infer",
        {"inputs": [text], "parameters": controls, "outputs": [{"name": "label"}]},
    )
    return [
        [max(scores, key=lambda one: one["score"])["label"] for scores in tei],
        [item["label"] for item in vllm["data"]],
        v2["outputs"][0]["data"],
    ]


def test_answers_on_all_doors(stack: Stack) -> None:
    texts, expected = zip(*rows(30), strict=True)
    for speedup in (1, 2):
        tei, vllm, v2 = labels_at_all_doors(list(texts), speedup)
        assert tei == vllm == v2
        # A short training run, and still no chance of seven in it.
        assert sum(map(str.__eq__, tei, expected)) >= 24
    info = ask(f"{SERVER}/info")
    assert info["model_id"].endswith("snips-int8") or info["served_model_name"] == "snips"


def test_the_volume_is_filled_once(stack: Stack) -> None:
    began = time.perf_counter()
    said = stack.compose("run", "--rm", "--no-deps", "trainer")
    assert "nothing to do" in said
    assert time.perf_counter() - began < 10
    # What an interrupted run left is cleared away, and what is complete is kept.
    look = ("run", "--rm", "--no-deps", "--entrypoint", "sh", "trainer", "-c")
    before = stack.compose(*look, "cd /models && mkdir .making && stat -c %Y snips/offramp.json")
    stack.compose(*look, "mv /models/snips-int8 /models/aside")
    try:
        stack.compose("run", "--rm", "--no-deps", "trainer", seconds=300)
        after = stack.compose(*look, "cd /models && stat -c %Y snips/offramp.json && ls -A")
        assert after.split() == [before.strip(), "aside", "snips", "snips-int8"]
    finally:
        stack.compose(*look, "rm -rf /models/aside")


def test_is_scraped(stack: Stack) -> None:
    until(
        lambda: {one["value"][1] for one in stack.series('up{job="offramp"}')} == {"1"}, "up is 1"
    )
    ask(f"{SERVER}/classify", {"input": "play some jazz", "speedup": 2})
    until(
        lambda: sum(float(one["value"][1]) for one in stack.series("offramp_exits_total")) >= 1,
        "an exit is counted",
    )


def test_an_alert_fires_and_resolves(stack: Stack) -> None:
    """The server hangs; whoever is on duty hears of it, and that it is over."""
    # A replica that Prometheus has never seen is missed by nobody.
    until(lambda: stack.series("offramp_ready == 1"), "is scraped")
    began = time.perf_counter()
    stack.docker("pause", stack.container("offramp")["Id"])
    try:
        until(lambda: monitoring.DOWN in stack.firing(), "the alert fires")
        stack.figures["alert_fires_s"] = round(time.perf_counter() - began, 1)
    finally:
        began = time.perf_counter()
        stack.docker("unpause", stack.container("offramp")["Id"])
    until(lambda: monitoring.DOWN not in stack.firing(), "the alert resolves")
    stack.figures["alert_resolves_s"] = round(time.perf_counter() - began, 1)
    stack.wait_until_healthy()


def test_comes_back_after_kill_9(stack: Stack) -> None:
    question = {"input": rows(1)[0][0], "speedup": 2}
    before, answer = stack.container("offramp"), ask(f"{SERVER}/classify", question)["data"]
    began = time.perf_counter()
    os.kill(before["State"]["Pid"], signal.SIGKILL)
    until(lambda: stack.container("offramp")["RestartCount"] > before["RestartCount"], "restarts")
    until(stack.is_ready, "ready again")
    stack.figures["killed_to_ready_s"] = round(time.perf_counter() - began, 2)
    stack.wait_until_healthy()
    after = stack.container("offramp")
    assert after["Id"] == before["Id"]
    assert after["State"]["Pid"] != before["State"]["Pid"]
    assert ask(f"{SERVER}/classify", question)["data"] == answer


class Asking(asyncio.Protocol):
    """A connection that asks as soon as it is one: what is slow here must not look like a server
    that did not answer."""

    def __init__(self, request: bytes, came: Counter[str]) -> None:
        self._request, self._came, self._received = request, came, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data

    def connection_lost(self, error: Exception | None) -> None:
        answer = re.match(rb"HTTP/1.1 (\d+) .*\r\n\r\n.*[]}]$", self._received, re.DOTALL)
        self._came["no answer" if answer is None else answer[1].decode()] += 1


async def arrive(address: tuple[str, int], came: Counter[str], stopped: asyncio.Event) -> None:
    """A request every 20 ms, each when it is due and on a connection of its own, until the server
    has stopped; what came of each."""
    body = json.dumps({"input": "play some jazz"})
    lines = ["POST /classify HTTP/1.1", "host: x", "connection: close"]
    lines += ["content-type: application/json", f"content-length: {len(body)}"]
    request = "\r\n".join([*lines, "", body]).encode()

    async def one() -> None:
        try:
            async with asyncio.timeout(5):
                loop = asyncio.get_running_loop()
                await loop.create_connection(lambda: Asking(request, came), *address)
        except OSError:  # nobody listens: the client knows, and asks somebody else
            came["not connected"] += 1

    async with asyncio.TaskGroup() as tasks:
        while not stopped.is_set():
            tasks.create_task(one())
            await asyncio.sleep(0.02)
    await asyncio.sleep(1)  # for the last answers


async def stop_under_load(stack: Stack) -> tuple[Counter[str], Counter[str], datetime]:
    """What came of requests before the stop and from then on, and when it was asked for."""
    networks = stack.container("offramp")["NetworkSettings"]["Networks"]
    # Not the published port: its proxy takes connections that nobody will answer.
    address = (next(iter(networks.values()))["IPAddress"], 3000)
    came: Counter[str] = Counter()
    stopped = asyncio.Event()
    load = asyncio.create_task(arrive(address, came, stopped))
    await asyncio.sleep(2)
    before, asked = came.copy(), datetime.now(UTC)
    await asyncio.to_thread(stack.compose, "stop", "offramp")
    stopped.set()
    await load
    return before, came - before, asked


def test_stops_without_losing_an_answer(stack: Stack) -> None:
    try:
        before, after, asked = asyncio.run(stop_under_load(stack))
        state = stack.container("offramp")["State"]
    finally:
        stack.compose("up", "--detach", "--no-build", "offramp")
    # The engine writes nanoseconds, which Python cannot read.
    ended = datetime.fromisoformat(state["FinishedAt"][:26].rstrip("Z") + "Z")
    took = (ended - asked).total_seconds()
    stack.figures["drain"] = {"before": before, "after": after, "asked_to_end_s": round(took, 1)}
    assert set(before) == {"200"}
    assert before["200"] > 20
    # Unready, and yet serving on, then 503 to new ones while those inside finish.
    assert after["200"] > 50
    assert after["no answer"] == 0
    assert set(after) <= {"200", "503", "not connected"}
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    # What it serves on for, and little more: nothing tries to send something before it ends.
    assert 5 < took < 9
    stack.wait_until_healthy()


def test_runs_with_little(stack: Stack) -> None:
    container = stack.container("offramp")
    process = psutil.Process(container["State"]["Pid"])
    assert set(process.uids()) == {10001}
    assert set(process.gids()) == {10001}
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    # The server itself, and no child of it or of health checks that ended without being waited for.
    assert process.cmdline()[1].endswith("offramp-serve")
    assert process.children(recursive=True) == []
    inside = ("exec", "--no-TTY", "offramp", "sh", "-c")
    for place, writable in (("/", 0), ("/opt/application", 0), ("/models", 0), ("/tmp", 1)):
        touch = f"touch {place}/x 2>/dev/null && rm {place}/x && echo 1 || echo 0"
        assert stack.compose(*inside, touch).strip() == str(writable), place
    host = container["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (2 << 30, 2_000_000_000, 256)
    assert host["PortBindings"] == {"3000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "3000"}]}


@pytest.mark.parametrize("image", ["offramp:cpu", "offramp:trainer"])
def test_an_image_holds_what_it_needs_and_no_more(stack: Stack, image: str) -> None:
    found = stack.docker.inspect(image)["Config"]
    assert found["User"] == "10001:10001"
    assert found["Labels"]["org.opencontainers.image.revision"] == "under-test"
    assert list(found["Volumes"]) == ["/models"]
    as_root = ("run", "--rm", "--network=none", "--user=0", "--entrypoint=sh", image, "-c")
    # Nothing that lends privileges, nothing to install or build with, no leavings of either.
    assert stack.docker(*as_root, "find / -xdev -type f -perm /6000") == ""
    assert "pip" not in stack.docker(*as_root, "ls /opt/offramp/bin")
    assert stack.docker(*as_root, "command -v gcc cc make || true") == ""
    leavings = "ls -d /src /wheel /root/.cache /var/lib/apt/lists/* 2>/dev/null || true"
    assert stack.docker(*as_root, leavings) == ""
    owner = stack.docker(*as_root, "stat -c %u /models /opt/application /opt/offramp").split()
    assert owner == ["10001", "0", "0"]


def test_listens_whatever_the_machine_is_called(stack: Stack) -> None:
    """Runtimes put the machine's name, or a longer or an older one, into HOSTNAME."""
    models = next(
        mount["Name"] for mount in stack.container("offramp")["Mounts"] if "Name" in mount
    )
    container = stack.docker(
        *(
            "run",
            "--detach",
            "--rm",
            "--read-only",
            "--tmpfs=/tmp",
            f"--volume={models}:/models:ro",
        ),
        *("--hostname=pod-7", "--env=HOSTNAME=pod-7.example.internal", "--env=PORT=8080"),
        *("--env=MODEL_ID=/models/snips-int8", "offramp:cpu"),
    ).strip()
    try:
        address = stack.docker.inspect(container)["NetworkSettings"]["IPAddress"]
        until(lambda: ask(f"http://{address}:8080/readyz"), "ready")
        until(
            lambda: stack.docker.inspect(container)["State"]["Health"]["Status"] == "healthy",
            "the check follows PORT",
        )
    finally:
        stack.docker("stop", "--time=1", container)


def test_the_load_profile_asks(stack: Stack) -> None:
    words = ("--profile", "load", "run", "--rm", "--no-TTY", "load")
    stack.docker.environment["LOAD_SECONDS"] = "3"
    report = stack.compose(*words)
    statuses = re.search(r"^statuses +(.*)$", report, re.MULTILINE)
    assert statuses is not None, report
    only = re.fullmatch(r"200: (\d+)", statuses[1])
    assert only is not None, report
    assert int(only[1]) > 50


def _links() -> list[str]:
    shown = subprocess.run(["ip", "-json", "link"], capture_output=True, text=True, check=True)
    return sorted(link["ifname"] for link in json.loads(shown.stdout))


def test_the_engine_leaves_nothing(folder: Path, built: Path) -> None:
    """What the fixtures promise to the machine, seen on an engine of its own."""
    networks, links = Path("/proc/thread-self/ns/net").readlink(), _links()
    with engines.own_network(), engines.engine(folder / "other", built, networks=True) as docker:
        assert Path("/proc/thread-self/ns/net").readlink() != networks
        docker("network", "create", "one")
    assert Path("/proc/thread-self/ns/net").readlink() == networks
    assert _links() == links
    assert not [
        one
        for one in psutil.process_iter(["cmdline"])
        if str(folder / "other") in " ".join(one.info["cmdline"] or [])
    ]
    shutil.rmtree(folder / "other")
