"""The whole line in one process: rows → fit → calibrate → checkpoint → HTTP → answer."""

import json
from pathlib import Path
from typing import Any

import httpx
import torch
from asgi_lifespan import LifespanManager

from offramp_model.checkpoint import load_checkpoint
from offramp_model.policies import make_policy
from offramp_model.recorded import record_exits, replay
from offramp_service.app import create_app
from offramp_service.settings import Settings


def rows_of(data: Path) -> tuple[list[str], list[int]]:
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


async def ask(checkpoint: Path, body: dict[str, Any]) -> list[dict[str, Any]]:
    app = create_app(Settings(model_id=checkpoint, max_client_batch_size=64))
    async with LifespanManager(app) as manager:
        transport = httpx.ASGITransport(app=manager.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/classify", json=body | {"return_details": True})
    assert answer.status_code == 200, answer.text
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


async def test_what_was_trained_is_what_answers(checkpoint: Path, data: Path) -> None:
    texts, labels = rows_of(data)
    answers = await ask(checkpoint, {"input": texts, "speedup": 1.5})
    opened = load_checkpoint(checkpoint)
    names = opened.model.labels
    right = sum(a["label"] == names[y] for a, y in zip(answers, labels, strict=True))
    assert right / len(labels) > 0.9, "it did not learn what a verb gives away"

    recorded = record_exits(opened.stack(), opened.tokenizer().encode(texts))
    policy = opened.manifest.exit_policy
    threshold = opened.table(policy).threshold_for(1.5)
    expected = replay(recorded, make_policy(policy), threshold)
    assert [a["details"]["exit_layer"] for a in answers] == expected.exit_layer.tolist()
    assert [a["label"] for a in answers] == [names[y] for y in expected.label.tolist()]


async def test_full_depth_is_the_last_exit(checkpoint: Path, data: Path) -> None:
    texts, _ = rows_of(data)
    answers = await ask(checkpoint, {"input": texts})
    opened = load_checkpoint(checkpoint)
    last = record_exits(opened.stack(), opened.tokenizer().encode(texts)).logits[-1]
    probs = torch.tensor([a["probs"] for a in answers])
    torch.testing.assert_close(probs, torch.softmax(last, -1), atol=1e-5, rtol=1e-4)
    assert {a["details"]["exit_layer"] for a in answers} == {opened.model.num_layers}
