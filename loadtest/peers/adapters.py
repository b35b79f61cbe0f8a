"""How each server is asked about a text, and where in its answer the label is.

Nothing else differs between them for the load generator. It knows nothing of processes or time.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from offramp_loadtest.http_client import Address, Reply, post


@dataclass(frozen=True)
class Adapter:
    """One server's HTTP: `body` words the question, `label` reads the answer's JSON."""

    path: str
    body: Callable[[str], dict[str, Any]]
    label: Callable[[Any], str]

    def request(self, address: Address, text: str) -> bytes:
        return post(address, self.path, json.dumps(self.body(text)).encode())

    def read(self, reply: Reply | None) -> str:
        """The label in a reply.

        Raises:
            ValueError: there is none.
        """
        if reply is None:
            raise ValueError("the connection ended without an answer")
        if reply.status != 200:
            raise ValueError(f"answered with {reply.status}: {reply.body[:200]!r}")
        try:
            return self.label(reply.json())
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"no label in {reply.body[:200]!r}") from error


def plain(path: str) -> Adapter:
    """`{"text": …}` → `{"label": …, "score": …}`: the servers written here."""
    return Adapter(path, lambda text: {"text": text}, lambda answer: str(answer["label"]))


def infinity(model: str) -> Adapter:
    """All labels with their scores, for each text of a list."""
    return Adapter(
        "/classify",
        lambda text: {"model": model, "input": [text]},
        lambda answer: str(max(answer["data"][0], key=lambda one: one["score"])["label"]),
    )


def triton(model: str) -> Adapter:
    """The Open Inference Protocol V2, texts as BYTES."""
    return Adapter(
        f"/v2/models/{model}/infer",
        lambda text: {
            "inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]
        },
        lambda answer: str(
            next(one for one in answer["outputs"] if one["name"] == "label")["data"][0]
        ),
    )


def offramp(speedup: float) -> Adapter:
    """vLLM's /classify, with the speed-up asked for."""
    return Adapter(
        "/classify",
        lambda text: {"input": text, "speedup": speedup},
        lambda answer: str(answer["data"][0]["label"]),
    )
