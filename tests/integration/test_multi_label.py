"""A multi-label checkpoint over HTTP: scores are each label's own, on every door."""

from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch

from loading import load
from offramp_model.checkpoint import load_checkpoint
from offramp_model.policies import make_supported_policy
from offramp_model.recorded import RecordedExits, record_exits, replay
from offramp_training.config import make_recipe
from offramp_training.fit import fit

SETS = "multi_label_classification"
fixtures = load("tests/unit/training/test_multi_label.py")
set_data: pytest.FixtureDef[Path] = fixtures.set_data


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory, support: ModuleType) -> Path:
    return support.write_tiny_checkpoint(
        tmp_path_factory.mktemp("service") / "sets", problem_type=SETS
    )


@pytest.fixture
def texts(support: ModuleType) -> list[str]:
    return support.random_texts(12, seed=8)


@pytest.fixture
def exits(directory: Path, texts: list[str]) -> RecordedExits:
    checkpoint = load_checkpoint(directory)
    return record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(texts))


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def predict(client: httpx.AsyncClient, texts: list[str], **body: Any) -> torch.Tensor:
    """Scores in label-id order; whatever the order, they are sorted in the answer."""
    answers = await post(client, "/predict", {"inputs": [[text] for text in texts], **body})
    labels = list((await client.get("/info")).json()["model_type"]["classifier"]["label2id"])
    for answer in answers:
        scores = [one["score"] for one in answer]
        assert scores == sorted(scores, reverse=True)
        assert sorted(one["label"] for one in answer) == sorted(labels)
    return torch.tensor(
        [[next(o["score"] for o in answer if o["label"] == name) for name in labels]
         for answer in answers]
    )  # fmt: skip


async def infer(client: httpx.AsyncClient, texts: list[str], **parameters: Any) -> dict[str, Any]:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}
    body = {"inputs": [tensor], "parameters": parameters}
    answer = await post(client, "/v2/models/sets/infer", body)
    return {one["name"]: one["data"] for one in answer["outputs"]}


def close(found: Any, expected: torch.Tensor) -> None:
    found = torch.as_tensor(found).reshape(expected.shape).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


async def test_scores_are_sigmoids_on_every_door(
    client: httpx.AsyncClient, texts: list[str], exits: RecordedExits, support: ModuleType
) -> None:
    last = exits.logits[-1]
    best = [support.LABELS[index] for index in last.argmax(-1).tolist()]
    items = (await post(client, "/classify", {"input": texts}))["data"]
    close([item["probs"] for item in items], last.sigmoid())
    assert [item["label"] for item in items] == best
    close(await predict(client, texts), last.sigmoid())
    tensors = await infer(client, texts)
    close(tensors["probabilities"], last.sigmoid())
    close(tensors["logits"], last)
    assert tensors["label"] == best
    body = {"instances": texts}
    predictions = (await post(client, "/v1/models/sets:predict", body))["predictions"]
    close([one["probabilities"] for one in predictions], last.sigmoid())
    close([one["score"] for one in predictions], last.sigmoid().amax(-1))
    assert [one["label"] for one in predictions] == best


async def test_another_activation_is_honoured(
    client: httpx.AsyncClient, texts: list[str], exits: RecordedExits
) -> None:
    last = exits.logits[-1]
    for name, expected in (
        ("softmax", last.softmax(-1)),
        ("sigmoid", last.sigmoid()),
        ("none", last),
    ):
        close(await predict(client, texts, parameters={"function_to_apply": name}), expected)
    close(await predict(client, texts, raw_scores=True), last)
    for use, expected in ((False, last), (True, last.sigmoid())):
        items = (await post(client, "/classify", {"input": texts, "use_activation": use}))["data"]
        close([item["probs"] for item in items], expected)
    items = (await post(client, "/classify", {"input": texts, "top_k": 1}))["data"]
    assert [item["top"][0]["label"] for item in items] == [item["label"] for item in items]


async def test_texts_leave_where_their_set_is_sure(
    client: httpx.AsyncClient, directory: Path, texts: list[str], exits: RecordedExits
) -> None:
    checkpoint = load_checkpoint(directory)
    policy = make_supported_policy("confidence", checkpoint.model)
    outcome = replay(exits, policy, 0.6)
    assert len(set(outcome.exit_layer.tolist())) > 1
    asked = {"input": texts, "threshold": 0.6, "return_details": True}
    items = (await post(client, "/classify", asked))["data"]
    assert [item["details"]["exit_layer"] for item in items] == outcome.exit_layer.tolist()
    close([item["details"]["exit_signal"] for item in items], outcome.signal.float())
    place = [exits.exit_layers.index(layer) for layer in outcome.exit_layer.tolist()]
    said = torch.stack([exits.logits[e, n] for n, e in enumerate(place)])
    close([item["probs"] for item in items], said.sigmoid())
    speedup = checkpoint.table("confidence").max_speedup
    threshold = checkpoint.table("confidence").threshold_for(speedup)
    outcome = replay(exits, policy, threshold)
    tensors = await infer(client, texts, speedup=speedup)
    assert tensors["exit_layer"] == outcome.exit_layer.tolist()


async def test_info_says_what_it_is(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    assert info["problem_type"] == SETS
    assert info["exit_policy"] == "confidence"


async def test_one_label_is_a_yes_or_no(
    running: Any, tmp_path: Path, support: ModuleType, texts: list[str]
) -> None:
    one = support.write_tiny_checkpoint(tmp_path / "sets", labels=("spam",), problem_type=SETS)
    checkpoint = load_checkpoint(one)
    encodings = checkpoint.tokenizer().encode(texts)
    last = record_exits(checkpoint.stack(), encodings).logits[-1]
    async with running(model_id=one) as client:
        items = (await post(client, "/classify", {"input": texts}))["data"]
        close([item["probs"] for item in items], last.sigmoid())
        assert {item["label"] for item in items} == {"spam"}
        assert {item["num_classes"] for item in items} == {1}
        close(await predict(client, texts), last.sigmoid())
        close((await infer(client, texts))["probabilities"], last.sigmoid())
        early = {"input": texts, "threshold": 0.6, "return_details": True}
        items = (await post(client, "/classify", early))["data"]
        outcome = replay(
            record_exits(checkpoint.stack(), encodings),
            make_supported_policy("confidence", checkpoint.model),
            0.6,
        )
        assert [item["details"]["exit_layer"] for item in items] == outcome.exit_layer.tolist()


async def test_what_was_trained_is_what_answers(
    running: Any, backbone: Path, set_data: Path, tmp_path: Path
) -> None:
    made = fit(make_recipe(fixtures.table_for(backbone)), tmp_path / "sets", data=str(set_data))
    rows = fixtures.load_split(str(set_data), "test")
    async with running(model_id=made, max_client_batch_size=64) as client:
        body = {"input": list(rows.inputs), "speedup": 1.5, "return_details": True}
        items = (await post(client, "/classify", body))["data"]
    said = [[label for label in range(3) if item["probs"][label] > 0.5] for item in items]
    right = [a == b for a, b in zip(said, fixtures.sets(rows), strict=True)]
    assert sum(right) / len(right) > 0.85
    assert sum(item["details"]["exit_layer"] for item in items) < 3 * len(items) / 1.2
