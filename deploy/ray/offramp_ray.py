"""offramp as a Ray Serve application: each replica owns an engine and runs the service's own
application, with its doors, headers, errors and metrics.

    Offramp   the deployment: what `offramp-serve` does around the application, as Ray does it
    build     what `serve.yaml` names as `import_path`

Ray knows which replicas there are, and leads requests to them; this module knows nothing about
models, batches or texts. Needs the extra `ray`, and this directory on PYTHONPATH of every node.
"""

import time
from typing import Any

from offramp_ray_retry import REPLICA, Asgi, Message, Receive, Scope, Send
from pydantic import BaseModel, ConfigDict
from ray import get_runtime_context, serve
from ray.serve import Application
from starlette.datastructures import MutableHeaders


class Arguments(BaseModel):
    """`args` of the application in `serve.yaml`."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any]  # of offramp-serve, with _ for -


@serve.ingress()
class Offramp:
    """One replica. It is ready when its models are loaded and warm, and is led no requests before;
    a replica that Ray takes out of service ends the requests inside first."""

    def __init__(self, settings: dict[str, Any]) -> None:
        # In the replica, not where the application is deployed from: that one needs no torch.
        from prometheus_client import disable_created_metrics

        from offramp_model.memory import keep_freed_memory
        from offramp_service.app import create_app
        from offramp_service.logs import configure_logging
        from offramp_service.settings import Settings

        keep_freed_memory()
        disable_created_metrics()
        own = Settings(**{"threads": self._cpus(), **settings})
        configure_logging(own)  # to standard error, which Ray keeps for each replica
        self._app = create_app(own)
        self._models = self._app.state.models
        self._revision: object = None
        self._asked = time.monotonic(), 0.0  # when, and how long engines had worked by then

    def __serve_build_asgi_app__(self) -> Asgi:
        return Signed(self._app, serve.get_replica_context().replica_tag)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Another `revision` opens the checkpoints' directories anew, while the old ones answer.
        One that cannot be served is logged, and the old one stays."""
        from offramp_service.watched import load_all

        before, self._revision = self._revision, user_config.get("revision")
        if self._models.lifecycle.ready and self._revision != before:
            await load_all(self._models)

    async def check_health(self) -> None:
        """As `/livez`: a replica whose engine has stopped or is stuck is replaced."""
        if self._models.lifecycle.died.is_set() or not self._models.alive:
            raise RuntimeError("an engine has stopped or is stuck")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Layer-work that waits, and the share of the time in which engines worked since the last
        call."""
        before, worked = self._asked
        now, batchers = time.monotonic(), [one.batcher for one in self._models]
        busy_s = sum(batcher.load.busy_s for batcher in batchers)
        self._asked = now, busy_s
        return {
            "layer_work": sum(max(0.0, one.scheduler.queue.layers) for one in batchers),
            # Counted from 0 again by a model that was exchanged.
            "busy": min(1.0, max(0.0, busy_s - worked) / max(now - before, 1e-3)),
        }

    @staticmethod
    def _cpus() -> int:
        """That Ray has given this replica. The engine's threads are as many."""
        assigned = get_runtime_context().get_assigned_resources()
        return max(1, int(assigned.get("CPU", 1)))


class Signed:
    """Says on every answer which replica gave it."""

    def __init__(self, app: Asgi, replica: str) -> None:
        self._app, self._replica = app, replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sign(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REPLICA] = self._replica
            await send(message)

        await self._app(scope, receive, sign if scope["type"] == "http" else send)


def build(arguments: Arguments) -> Application:
    """The application; what else there is to say about the deployment is in `serve.yaml`."""
    deployment = serve.deployment(
        Offramp,
        name="Offramp",
        max_ongoing_requests=512,
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=35,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployment.bind(arguments.settings)
