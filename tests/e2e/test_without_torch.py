"""The real command where torch cannot be imported: graphs are served all the same, and answer as
torch answers; what needs it says so."""

import json
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from loading import load
from offramp_model.checkpoint import load_checkpoint, update_manifest
from offramp_model.policies import make_supported_policy
from offramp_model.recorded import record_exits, replay
from offramp_training.export import export_onnx

support = load("tests/unit/service/support.py")

# As where `offramp[serve,onnx]` is all that was installed.
WITHOUT = """
import sys
ABSENT = {"torch", "triton", "transformers", "onnx"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
assert not ABSENT & sys.modules.keys()
sys.meta_path.insert(0, Absent())
from offramp_service.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def command(directory: Path) -> list[str]:
    flags = ("--model-id", str(directory), "--port", "0", "--threads", "1")
    return [sys.executable, "-c", WITHOUT, *flags]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_tiny_checkpoint(tmp_path_factory.mktemp("lean") / "plain")


@pytest.fixture(scope="module")
def graphs(plain: Path) -> Path:
    """The float32 export, with the tables of torch as its own."""
    exported = export_onnx(load_checkpoint(plain), plain.parent / "graphs", measured_on=None)
    tables = exported.manifest.calibration
    ours = tuple(table.model_copy(update={"backend": "onnx"}) for table in tables)
    update_manifest(exported.directory, exported.manifest.model_copy(update={"calibration": ours}))
    return exported.directory


@pytest.fixture(scope="module")
def port(graphs: Path) -> Iterator[int]:
    process = subprocess.Popen(command(graphs), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        assert "is ready" in greeting
        yield int(greeting.partition("http://127.0.0.1:")[2].partition("/")[0])
    finally:
        process.terminate()
        process.communicate(timeout=30)


def post(port: int, path: str, **body: Any) -> Any:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, json.dumps(body).encode())
        response = connection.getresponse()
        content = json.loads(response.read())
        assert response.status == 200, content
        return content
    finally:
        connection.close()


@pytest.mark.parametrize("speedup", [1.0, 1.5, 2.0])
def test_answers_are_those_of_torch(plain: Path, port: int, speedup: float) -> None:
    texts = support.random_texts(60, seed=11)
    checkpoint = load_checkpoint(plain)
    name = checkpoint.manifest.exit_policy
    recorded = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(texts))
    threshold = checkpoint.table(name).threshold_for(speedup)
    expected = replay(recorded, make_supported_policy(name, checkpoint.model), threshold)
    said = []
    for start in range(0, len(texts), 20):
        body = {"input": texts[start : start + 20], "speedup": speedup, "return_details": True}
        said += post(port, "/classify", **body)["data"]
    assert [one["details"]["exit_layer"] for one in said] == expected.exit_layer.tolist()
    assert [one["label"] for one in said] == [support.LABELS[i] for i in expected.label.tolist()]
    for one, signal in zip(said, expected.signal.tolist(), strict=True):
        assert one["details"]["exit_signal"] == pytest.approx(signal, abs=1e-5)
    if speedup > 1:
        assert len({one["details"]["exit_layer"] for one in said}) > 1


def test_the_other_doors_answer(port: int) -> None:
    assert {one["label"] for one in post(port, "/predict", inputs="w1 w2")} == set(support.LABELS)
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["w1 w2"]}
    assert post(port, "/v2/models/graphs/infer", inputs=[tensor])["outputs"]


def test_a_checkpoint_of_torch_is_refused_by_name(plain: Path) -> None:
    done = subprocess.run(command(plain), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "plain runs in torch, which is not installed" in done.stderr
    assert "'offramp[torch]'" in done.stderr
    assert "offramp-train export --format onnx" in done.stderr
    assert "Traceback" not in done.stderr
