"""The peers' own clients against the real command: Hugging Face's, Triton's, plain httpx as vLLM's
users have it; and schemathesis, which believes nothing that the OpenAPI document says.

KServe's client wants versions of libraries that the tools here do not, so it has an environment of
its own: `make test-kserve` (tests/clients/kserve_client.py).
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from loading import load
from offramp_model.checkpoint import load_checkpoint
from offramp_model.recorded import record_exits

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8", "w9 w10"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    support = load("tests/unit/service/support.py")
    return support.write_tiny_checkpoint(tmp_path_factory.mktemp("clients") / "tiny")


@pytest.fixture(scope="module")
def address(directory: Path) -> Iterator[str]:
    """A running server, as host:port."""
    command = [sys.executable, "-m", "offramp_service", "--model-id", str(directory)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--threads", "1", "--drain-seconds", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PORT"},
    )
    assert process.stdout is not None
    found = re.search(r"http://(127\.0\.0\.1:\d+)/classify", process.stdout.readline())
    assert found is not None
    yield found[1]
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()


@pytest.fixture(scope="module")
def expected(directory: Path) -> np.ndarray[Any, Any]:
    """Probabilities of the whole model, computed beside the service."""
    checkpoint = load_checkpoint(directory)
    recorded = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(TEXTS))
    return recorded.logits[-1].softmax(-1).numpy()


def text_tensor(texts: list[str], *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("text", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=object), binary_data=binary)
    return tensor


def test_hugging_faces_client(
    address: str, expected: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # loopback is no hub
    client = huggingface_hub.InferenceClient(model=f"http://{address}")
    labels = ["negative", "positive", "neutral"]
    for text, probabilities in zip(TEXTS, expected, strict=True):
        best = client.text_classification(text)
        assert best.label == labels[probabilities.argmax()]
        assert best.score == pytest.approx(probabilities.max(), abs=1e-4)
        raw = client.text_classification(text, function_to_apply="none", top_k=1)
        assert raw.label == best.label
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="inputs is empty"):
        client.text_classification("")


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client(address: str, expected: np.ndarray[Any, Any], binary: bool) -> None:
    with triton.InferenceServerClient(address) as client:
        result = client.infer("tiny", [text_tensor(TEXTS, binary=binary)], request_id="r-7")
        assert result.get_response()["id"] == "r-7"
        assert result.as_numpy("probabilities") == pytest.approx(expected, abs=1e-4)
        assert result.as_numpy("exit_layer").tolist() == [4] * len(TEXTS)
        speedups = triton.InferInput("speedup", [len(TEXTS)], "FP32")
        speedups.set_data_from_numpy(np.array([1, 4, 1, 4], np.float32), binary_data=binary)
        mixed = client.infer(
            "tiny",
            [text_tensor(TEXTS, binary=binary), speedups],
            outputs=[
                triton.InferRequestedOutput("exit_layer", binary_data=binary),
                triton.InferRequestedOutput("logits", binary_data=binary, class_count=1),
            ],
            timeout=20_000_000,
            priority=1,
        )
        assert mixed.as_numpy("exit_layer").tolist() == [4, 1, 4, 1]
        assert mixed.as_numpy("logits").shape == (len(TEXTS), 1)


def test_tritons_questions(address: str) -> None:
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "offramp"
        assert client.get_model_metadata("tiny")["inputs"][0]["name"] == "text"
        assert client.get_model_config("tiny")["input"][0]["data_type"] == "TYPE_STRING"
        assert client.get_model_repository_index()[0]["state"] == "READY"
        assert client.get_inference_statistics("tiny")["model_stats"][0]["name"] == "tiny"
        with pytest.raises(InferenceServerException, match="'other' is not served here"):
            client.infer("other", [text_tensor(["a"])])
        with pytest.raises(InferenceServerException, match="speedup is 99"):
            client.infer("tiny", [text_tensor(["a"])], parameters={"speedup": 99})


def test_vllms_users(address: str, expected: np.ndarray[Any, Any]) -> None:
    with httpx.Client(base_url=f"http://{address}") as client:
        (card,) = client.get("/v1/models").json()["data"]
        for path in ("/classify", "/v1/classify"):
            content = client.post(path, json={"model": card["id"], "input": TEXTS}).json()
            found = np.array([item["probs"] for item in content["data"]])
            assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nothing_that_the_document_allows_makes_the_service_fail(
    address: str, tmp_path: Path
) -> None:
    """Requests from the document's own schemas and beside them: no 5xx, no answer of another form
    than the document says."""
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,response_headers_conformance"
    )
    program = Path(sys.executable).with_name("schemathesis")
    run = subprocess.run(
        [
            *(program, "run", f"http://{address}/openapi.json", "--checks", checks),
            *("--max-examples", "15", "--no-color", "--seed", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=230,
        cwd=tmp_path,  # it leaves a cache behind
    )
    assert run.returncode == 0, run.stdout[-5000:]
