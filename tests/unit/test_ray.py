"""What is in deploy/ray, as far as it can be checked without Ray (`make test-ray` has it)."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from loading import ROOT, load
from offramp_service.settings import Settings

DEPLOY = ROOT / "deploy" / "ray"
retry = load("deploy/ray/offramp_ray_retry.py")
QueuedWork = load("deploy/ray/offramp_ray_scaling.py").QueuedWork


# -- the files -------------------------------------------------------------------------------------


def serve_config() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    return content


def ray_service() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    return content


def test_settings_are_those_of_the_service() -> None:
    for config in (serve_config(), yaml.safe_load(ray_service()["spec"]["serveConfigV2"])):
        (application,) = config["applications"]
        settings = application["args"]["settings"]
        assert settings.keys() <= Settings.model_fields.keys()
        Settings(**settings)


def test_kubernetes_runs_what_the_file_for_one_machine_has() -> None:
    here, there = serve_config(), yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    for config in (here, there):
        del config["applications"][0]["args"]["settings"]["model_id"]
        del config["applications"][0]["args"]["settings"]["served_model_name"]
    assert here == there


def test_times_fit_each_other() -> None:
    """What is inside a replica may end, and each who waits for it waits a little longer."""
    config, pods = serve_config(), ray_service()["spec"]["rayClusterConfig"]
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    request_s = application["args"]["settings"]["request_timeout_ms"] / 1000
    assert request_s < deployment["graceful_shutdown_timeout_s"]
    assert request_s < config["http_options"]["request_timeout_s"]
    (engines,) = pods["workerGroupSpecs"]
    grace_s = engines["template"]["spec"]["terminationGracePeriodSeconds"]
    assert deployment["graceful_shutdown_timeout_s"] < grace_s


def test_a_worker_holds_a_replica() -> None:
    (deployment,) = serve_config()["applications"][0]["deployments"]
    pods = ray_service()["spec"]["rayClusterConfig"]
    (engines,) = pods["workerGroupSpecs"]
    scaling = deployment["autoscaling_config"]
    assert engines["minReplicas"] >= scaling["min_replicas"]
    assert engines["maxReplicas"] >= scaling["max_replicas"]
    (container,) = engines["template"]["spec"]["containers"]
    assert (
        int(container["resources"]["limits"]["cpu"]) > deployment["ray_actor_options"]["num_cpus"]
    )


def test_all_name_one_ray() -> None:
    version = ray_service()["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"FROM rayproject/ray:{version}-" in (DEPLOY / "Dockerfile").read_text()
    minor = ".".join(version.split(".")[:2])
    assert f"ray[serve]>={minor}," in (ROOT / "pyproject.toml").read_text()


# -- how many replicas -----------------------------------------------------------------------------


def wanted(layer_work: list[float], busy: list[float], most_busy: float = 0.8) -> int:
    figures = {"layer_work": dict(enumerate(layer_work)), "busy": dict(enumerate(busy))}
    context = SimpleNamespace(aggregated_metrics=figures)
    number, _ = QueuedWork(50.0, most_busy)(context)
    assert isinstance(number, int)
    return number


def test_replicas_go_by_what_waits_and_by_who_is_busy() -> None:
    assert wanted([0, 0], [0.1, 0.1]) == 1
    assert wanted([0, 0], [0.7, 0.7]) == 2  # one alone would be busy more than 0.8 of the time
    assert wanted([60, 60], [1, 1]) == 3
    assert wanted([500, 500], [1, 1]) == 20
    assert wanted([50, 50], [1, 1], most_busy=1.0) == 2
    # Replicas that have not reported yet.
    assert QueuedWork(50.0)(SimpleNamespace(aggregated_metrics=None))[0] == 1
    assert QueuedWork(50.0)(SimpleNamespace(aggregated_metrics={}))[0] == 1


@pytest.mark.parametrize("wrong", [(0, 0.8), (9, 0), (9, 2)])
def test_targets_that_make_no_sense_are_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="layer_work must be above 0 and busy in"):
        QueuedWork(*wrong)


# -- a request whose replica died ------------------------------------------------------------------


class Proxy:
    """Ray's, with these fates for a request, one after the other: "dead" gives no answer at all, a
    number is Ray's own answer, a list with a number the service's."""

    def __init__(self, *fates: Any) -> None:
        self.fates = list(fates)
        self.bodies: list[bytes] = []
        self.headers: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        self.headers.append(list(scope["headers"]))
        scope["headers"].append((b"x-added-by-ray", b"1"))
        fate = self.fates.pop(0)
        if fate == "dead":
            return
        signed = [(b"x-offramp-replica", b"r1")] if isinstance(fate, list) else []
        status = fate[0] if isinstance(fate, list) else fate
        await send({"type": "http.response.start", "status": status, "headers": signed})
        await send({"type": "http.response.body", "body": b"said %d" % status})


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 0.0)


async def ask(
    proxy: Any, *chunks: bytes, stays: bool = True, path: str = "/classify"
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body; 0 if there was no answer."""
    coming = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks) - 1}
        for number, chunk in enumerate(chunks)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        if not coming and stays:
            await asyncio.Event().wait()
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await retry.Retry(proxy)(
        {"type": "http", "path": path, "headers": [(b"a", b"b")]}, receive, send
    )
    if not sent:
        return 0, {}, b""
    start, *bodies = sent
    return start["status"], dict(start["headers"]), b"".join(one["body"] for one in bodies)


async def test_an_answer_passes_as_it_is() -> None:
    proxy = Proxy([200])
    status, headers, body = await ask(proxy, b"one", b"two")
    assert (status, body) == (200, b"said 200")
    assert headers == {b"x-offramp-replica": b"r1"}
    assert proxy.bodies == [b"onetwo"]


@pytest.mark.parametrize("fate", ["dead", 500, 503])
async def test_what_a_dead_replica_had_goes_to_another(fate: Any) -> None:
    proxy = Proxy(fate, fate, [200])
    status, headers, body = await ask(proxy, b"one", b"two")
    assert (status, body) == (200, b"said 200")
    assert headers[b"x-offramp-attempts"] == b"3"
    assert proxy.bodies == [b"onetwo"] * 3  # all of it, each time
    assert proxy.headers == [[(b"a", b"b")]] * 3  # and as it came


@pytest.mark.parametrize("fate", [[500], [503], [429], 429, 404, 408])
async def test_who_has_an_answer_is_not_asked_again(fate: Any) -> None:
    """The service's own errors, and what Ray says for other reasons."""
    proxy = Proxy(fate)
    status, headers, _ = await ask(proxy, b"x")
    assert status == (fate[0] if isinstance(fate, list) else fate)
    assert b"x-offramp-attempts" not in headers


async def test_a_probe_of_the_proxy_has_its_answer_at_once() -> None:
    proxy = Proxy(503)
    assert (await ask(proxy, b"", path="/-/healthz"))[0] == 503
    assert len(proxy.bodies) == 1


async def test_it_ends_some_time() -> None:
    proxy = Proxy(*[503] * 20)
    status, headers, _ = await ask(proxy, b"x")
    assert status == 503
    assert headers[b"x-offramp-attempts"] == b"8"
    assert len(proxy.bodies) == 8
    silent = Proxy(*["dead"] * 20)
    assert (await ask(silent, b"x"))[0] == 0  # the server says 500 then
    assert len(silent.bodies) == 8


async def test_nothing_is_sent_again_for_a_client_that_has_gone() -> None:
    class Cancels(Proxy):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await super().__call__(scope, receive, send)
            assert (await receive())["type"] == "http.disconnect"

    proxy = Cancels(*["dead"] * 20)
    assert (await ask(proxy, b"x", stays=False))[0] == 0
    assert len(proxy.bodies) == 1


async def test_a_body_that_is_too_large_to_keep_goes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "MOST_KEPT", 5)
    proxy = Proxy("dead")
    status, _, _ = await ask(proxy, b"123", b"456", b"789")
    assert status == 0
    assert proxy.bodies == [b"123456789"]


async def test_other_protocols_pass() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await retry.Retry(app)({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]
