"""offramp on Ray Serve, for real: two simulated nodes, requests through Ray's proxy, and what must
not lose any of them.

Run by an interpreter that has the extras `ray` and `serve`, best with no network but loopback
(`make test-ray`). Phases, each under load except the first:

    doors      all three answer, with the service's own headers and errors
    node       a node is killed, with the replica on it
    exchange   replicas open the checkpoint anew (another `revision`)
    update     replicas are replaced by ones with other settings
    scale      load until the policy asks for another replica

A request is *accepted* when the proxy that is asked has read it. It is lost if it gets no answer,
or one of Ray's (500, 503) instead of the service's. What a proxy itself has in hand dies with its
node; that is the client's or balancer's to send again, and not counted here.
"""

import argparse
import http.client
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "ray"
# Inherited by every process of the cluster, so set before Ray is loaded.
sys.path.insert(0, str(DEPLOY))
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "offramp_ray_retry:proxy_middlewares"
# Replicas of all nodes by what they have open, not those of the proxy's node first.
os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray  # noqa: E402
import yaml  # noqa: E402
from offramp_ray_retry import ATTEMPTS, REPLICA  # noqa: E402
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.serve.context import _get_global_client  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

HOST, PORT, MODEL = "127.0.0.1", 8000, "clf"
TEXT = "play some jazz"
DOORS: dict[str, dict[str, Any]] = {
    "/predict": {"inputs": TEXT},
    "/classify": {"input": TEXT},
    f"/v2/models/{MODEL}/infer": {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}]
    },
}
CLIENTS = 12
SETTLING_S = 90.0


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, content: Any = None
) -> Reply:
    body = None if content is None else json.dumps(content)
    connection.request(method, path, body, {"content-type": "application/json"})
    answer = connection.getresponse()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return Reply(answer.status, headers, answer.read())


def once(method: str, path: str, content: Any = None) -> Reply:
    connection = http.client.HTTPConnection(HOST, PORT, timeout=60)
    try:
        return ask(connection, method, path, content)
    finally:
        connection.close()


@dataclass
class Load:
    """Clients that ask one request after the other, through all doors."""

    texts: int = 1
    clients: int = CLIENTS
    statuses: Counter[str] = field(default_factory=Counter)
    replicas: Counter[str] = field(default_factory=Counter)
    again: int = 0  # answered at a further attempt of the proxy
    slowest_s: float = 0.0
    lost: list[str] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(self.clients)]
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for one in self._threads:
            one.join()

    def _run(self) -> None:
        connection = http.client.HTTPConnection(HOST, PORT, timeout=60)
        doors = list(DOORS.items())
        turn = 0
        while not self._over.is_set():
            path, content = doors[turn % len(doors)]
            turn += 1
            if self.texts > 1:
                path, content = "/classify", {"input": [TEXT] * self.texts}
            started = time.monotonic()
            try:
                reply = ask(connection, "POST", path, content)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self._note(repr(error), None, time.monotonic() - started)
            else:
                self._note(str(reply.status), reply, time.monotonic() - started)

    def _note(self, status: str, reply: Reply | None, seconds: float) -> None:
        with self._lock:
            self.statuses[status] += 1
            self.slowest_s = max(self.slowest_s, seconds)
            if reply is not None and REPLICA in reply.headers:
                self.replicas[reply.headers[REPLICA]] += 1
                self.again += ATTEMPTS in reply.headers
            # 429 is the service's own answer, and says that it was not accepted.
            if reply is None or (status != "200" and status != "429"):
                self.lost.append(f"{status} {reply.body[:200]!r}" if reply else status)

    @property
    def figures(self) -> dict[str, Any]:
        return {
            "requests": sum(self.statuses.values()),
            "statuses": dict(self.statuses),
            "lost": len(self.lost),
            "sent_again": self.again,
            "slowest_s": round(self.slowest_s, 2),
            "replicas_seen": len(self.replicas),
        }


# -- the application -------------------------------------------------------------------------------


def deploy(settings: dict[str, Any], revision: int = 1) -> None:
    """What `serve deploy` does with `serve.yaml`, made smaller; it is under way afterwards."""
    content = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    content["proxy_location"] = "HeadOnly"  # both nodes have one address
    content["http_options"] |= {"host": HOST, "port": PORT}
    (application,) = content["applications"]
    application["args"]["settings"] = settings
    (deployment,) = application["deployments"]
    deployment["user_config"]["revision"] = revision
    deployment["ray_actor_options"] = {"num_cpus": 1, "resources": {"engine": 1}}
    scaling = deployment["autoscaling_config"]
    scaling |= {"max_replicas": 3, "upscale_delay_s": 1}
    scaling["policy"]["policy_kwargs"] = {"layer_work": 40, "busy": 1.0}
    # Ray has no public call for this; its command and its REST door end here.
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(content))


def running(*, while_settling: bool = False) -> int:
    """Replicas; 0 while there is no application, or one that is not as wanted."""
    application = serve.status().applications.get("offramp")
    if application is None or not application.deployments:
        return 0
    if application.status != "RUNNING" and not while_settling:
        return 0
    (deployment,) = application.deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def told(name: str) -> set[Any]:
    """A field of `/info`, of whichever replicas answer."""
    return {json.loads(once("GET", "/info").body)[name] for _ in range(20)}


def wait_until(what: str, is_so: Callable[[], bool]) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    while not is_so():
        if time.monotonic() - started > SETTLING_S:
            raise AssertionError(f"{what}: not within {SETTLING_S:g} s; {serve.status()}")
        time.sleep(0.1)
    return round(time.monotonic() - started, 1)


# -- phases ----------------------------------------------------------------------------------------


def check_doors() -> dict[str, Any]:
    for path, content in DOORS.items():
        reply = once("POST", path, content)
        assert reply.status == 200, (path, reply)
        for name in ("x-speedup-achieved", "x-queue-time", "x-request-id", REPLICA):
            assert name in reply.headers, (path, name, reply.headers)
        wrong = once("POST", path, {**content, "parameters": {"speedup": 0.5}, "speedup": 0.5})
        assert wrong.status == 422, (path, wrong)
        assert b"speedup" in wrong.body, (path, wrong)
    assert "error_type" in json.loads(once("POST", "/predict", {"inputs": []}).body)
    assert once("POST", "/v2/models/nobody/infer", {"inputs": []}).status == 404
    assert once("GET", "/readyz").status == once("GET", "/livez").status == 200
    assert json.loads(once("GET", "/info").body)["layer_cost"]["tokens"]
    assert b"offramp_queue_layer_work" in once("GET", "/metrics").body
    return {"doors": len(DOORS), **cost_of_the_way()}


def cost_of_the_way() -> dict[str, float]:
    """Milliseconds of single requests one after the other, in all and outside the service."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=60)
    whole, around = [], []
    for _ in range(200):
        started = time.monotonic()
        reply = ask(connection, "POST", "/classify", DOORS["/classify"])
        whole.append(1000 * (time.monotonic() - started))
        around.append(whole[-1] - float(reply.headers["x-total-time"]))
    connection.close()
    return {"p50_ms": round(median(whole), 1), "p50_outside_ms": round(median(around), 1)}


def kill_node(cluster: Cluster, node: Any) -> dict[str, Any]:
    with Load() as load:
        time.sleep(3)
        seen = len(load.replicas)
        cluster.remove_node(node, allow_graceful=False)
        noticed_s = wait_until("the node is missed", lambda: running(while_settling=True) < 2)
        cluster.add_node(num_cpus=3, resources={"engine": 2})
        back_s = wait_until("two replicas again", lambda: running() == 2)
        time.sleep(3)
    assert seen == 2, "one replica had no load"
    return {**load.figures, "noticed_s": noticed_s, "restored_s": back_s, "said": load.lost[:3]}


def exchange(settings: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's directory leads to another one from now on."""
    before = told("model_sha")
    with Load() as load:
        time.sleep(1)
        deploy(settings, revision=2)
        took_s = wait_until("another checkpoint", lambda: not before & told("model_sha"))
        time.sleep(2)
    assert len(load.replicas) == 2, "replicas were replaced"
    return {**load.figures, "took_s": took_s, "said": load.lost[:3]}


def update(settings: dict[str, Any]) -> dict[str, Any]:
    """Replicas of their own for other settings."""
    with Load() as load:
        time.sleep(1)
        deploy({**settings, "model_version": "2"}, revision=2)
        took_s = wait_until(
            "two new replicas", lambda: running() == 2 and told("model_version") == {"2"}
        )
        time.sleep(2)
    assert len(load.replicas) >= 4, "old replicas were not replaced"
    return {**load.figures, "took_s": took_s, "said": load.lost[:3]}


def scale() -> dict[str, Any]:
    with Load(texts=32, clients=16) as load:
        took_s = wait_until("a third replica", lambda: running() == 3)
        time.sleep(3)
    return {**load.figures, "scaled_up_s": took_s, "said": load.lost[:3]}


def main() -> int:
    args = _arguments()
    here = args.work / "checkpoint"
    here.symlink_to(args.checkpoint.resolve())
    settings = {"model_id": str(here), "served_model_name": MODEL, "warmup": True, "threads": 1}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "resources": {"engine": 1}, "include_dashboard": False},
    )
    second = cluster.add_node(num_cpus=2, resources={"engine": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    report: dict[str, Any] = {"ray": ray.__version__}
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": HOST, "port": PORT})
        deploy(settings)
        report["started_s"] = wait_until("two replicas", lambda: running() == 2)

        def other_checkpoint() -> dict[str, Any]:
            here.unlink()
            here.symlink_to(args.other.resolve())
            return exchange(settings)

        phases: dict[str, Callable[[], dict[str, Any]]] = {
            "doors": check_doors,
            "node": lambda: kill_node(cluster, second),
            "exchange": other_checkpoint,
            "update": lambda: update(settings),
            "scale": scale,
        }
        for name, phase in phases.items():
            report[name] = phase()
            print(name, json.dumps(report[name]), flush=True)
        started = time.monotonic()
        serve.shutdown()
        report["shut_down_s"] = round(time.monotonic() - started, 1)
    finally:
        ray.shutdown()
        cluster.shutdown()
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    lost = sum(one["lost"] for one in report.values() if isinstance(one, dict) and "lost" in one)
    print(f"{lost} requests lost")
    return 1 if lost else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("other", type=Path, help="that is served from `exchange` on")
    parser.add_argument("--work", type=Path, required=True, help="an empty directory")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
