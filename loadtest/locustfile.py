"""Locust against a deployment, for people who want its page: a task for each door, tagged with its
name, with the controls that the page or the command line says.

    locust -f loadtest/locustfile.py --host http://HOST:3000
    locust -f loadtest/locustfile.py --host URL --headless --tags vllm v2 --speedups 1,2
    LOCUST_SHAPE=steps locust -f loadtest/locustfile.py --host URL --headless

Locust's users wait for their answers: a closed loop, which sends less to a slow server. Each user
here keeps a pace (`--pace`), so that this begins only where an answer takes longer than that. For
latencies that are to be believed there is `offramp-load`. Of offramp this file uses how questions
and answers look, no more.
"""

import os
import random
from pathlib import Path
from typing import Any, ClassVar

from locust import FastHttpUser, LoadTestShape, constant_throughput, events, tag, task
from locust.env import Environment

from offramp_loadtest.doors import read, write
from offramp_loadtest.texts import lognormal, make_text, read_texts


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    ours = parser.add_argument_group("offramp")
    ours.add_argument(
        "--speedups", default="", help="as 1,1.5,2: each request asks for one of them"
    )
    ours.add_argument("--deadline-ms", type=int, default=0, help="0: none")
    ours.add_argument("--batch", type=int, default=0, help="texts in a list; 0: single texts")
    ours.add_argument("--pace", type=float, default=1.0, help="requests a second of each user")
    ours.add_argument("--texts-file", default="", help=".jsonl[.gz], or a text a line")
    ours.add_argument("--served-model", default="", help="default: what /info says")
    ours.add_argument("--api-key-env", default="", help="environment variable with the API key")


_lengths = lognormal(median=12, p95=40, most=200)
_texts: list[str] = []
_chance = random.Random()


@events.test_start.add_listener
def _read_texts(environment: Environment, **_: Any) -> None:
    _texts.clear()
    if name := environment.parsed_options.texts_file:
        _texts.extend(read_texts(Path(name)))


class Client(FastHttpUser):
    """Asks at all doors; `--tags` and `--exclude-tags` choose among them."""

    def wait_time(self) -> float:
        return float(constant_throughput(self.environment.parsed_options.pace)(self))

    def on_start(self) -> None:
        options = self.environment.parsed_options
        key = os.environ.get(options.api_key_env, "") if options.api_key_env else ""
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self.model = options.served_model or self._asked_model()
        self.speedups = [float(one) for one in options.speedups.split(",") if one]

    def _asked_model(self) -> str:
        with self.client.get(
            "/info", headers=self.headers, name="/info", catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure("no /info; name the model with --served-model")
                return ""
            response.success()
            return str(response.json()["served_model_name"])

    @tag("vllm")
    @task(4)
    def vllm(self) -> None:
        self._ask("vllm")

    @tag("tei")
    @task(2)
    def tei(self) -> None:
        self._ask("tei")

    @tag("v2", "kserve")
    @task
    def v2(self) -> None:
        self._ask("v2")

    @tag("v2-binary", "kserve")
    @task
    def v2_binary(self) -> None:
        self._ask("v2-binary")

    @tag("v1", "kserve")
    @task
    def v1(self) -> None:
        self._ask("v1")

    def _ask(self, door: str) -> None:
        """One question, and whether its answer can be read."""
        options = self.environment.parsed_options
        controls: dict[str, Any] = {"truncate": True}
        if self.speedups:
            controls["speedup"] = random.choice(self.speedups)
        if options.deadline_ms:
            controls["deadline_ms"] = options.deadline_ms
        texts = [self._text() for _ in range(max(1, options.batch))]
        body = write(door, texts, self.model, controls, single=not options.batch)
        own = dict(one.split(": ", 1) for one in body.headers)
        asked_for = f" speedup {controls['speedup']:g}" if "speedup" in controls else ""
        with self.client.post(
            body.path,
            data=body.content,
            headers={"content-type": body.content_type, **own, **self.headers},
            name=f"{door}{asked_for}",
            catch_response=True,
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            header = response.headers.get("inference-header-content-length")
            try:
                labels = read(door, response.content, header).labels
            except ValueError as error:
                response.failure(str(error))
                return
            if len(labels) == len(texts):
                response.success()
            else:
                response.failure(f"{len(labels)} answers to {len(texts)} texts")

    def _text(self) -> str:
        return random.choice(_texts) if _texts else make_text(_lengths(_chance), _chance)


class Steps(LoadTestShape):
    """Users by time: few, twice as many, more than can be answered, few again. Only where
    LOCUST_SHAPE=steps asks for it, because a shape overrides what the page says."""

    abstract = os.environ.get("LOCUST_SHAPE") != "steps"
    stages: ClassVar = ((60, 0.25), (120, 0.5), (180, 1.0), (240, 0.25))
    """Until when, in seconds; users, as a share of LOCUST_SHAPE_USERS."""

    def tick(self) -> tuple[int, float] | None:
        most = int(os.environ.get("LOCUST_SHAPE_USERS", "100"))
        faster = float(os.environ.get("LOCUST_SHAPE_FASTER", "1"))
        now = self.get_run_time() * faster
        for until, share in self.stages:
            if now < until:
                return max(1, round(share * most)), max(1.0, most / 10)
        return None
