"""Which backend and dtype a directory is served with, and with which calibration."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from asgi_lifespan import LifespanManager

from loading import load
from offramp_model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, update_manifest
from offramp_model.recorded import record_exits
from offramp_service.app import create_app
from offramp_service.served_model import SettingsError, load_model
from offramp_service.settings import Settings
from offramp_training.export import export_onnx

support = load("tests/unit/service/support.py")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_tiny_checkpoint(tmp_path_factory.mktemp("backends") / "plain")


@pytest.fixture(scope="module")
def graphs(plain: Path) -> Path:
    """The float32 export, with the tables of torch as its own as well."""
    exported = export_onnx(load_checkpoint(plain), plain.parent / "graphs", measured_on=None)
    tables = exported.manifest.calibration
    ours = tuple(table.model_copy(update={"backend": "onnx"}) for table in tables)
    manifest = exported.manifest.model_copy(update={"calibration": (*tables, *ours)})
    update_manifest(exported.directory, manifest)
    return exported.directory


def test_auto_is_what_the_directory_is_for(plain: Path, graphs: Path) -> None:
    torch_served = load_model(Settings(model_id=plain, threads=5))
    onnx_served = load_model(Settings(model_id=graphs, threads=1))
    assert (torch_served.backend, torch_served.dtype, torch_served.torch_threads) == (
        *("torch", "float32"),
        5,
    )
    assert (onnx_served.backend, onnx_served.dtype, onnx_served.torch_threads) == (
        *("onnx", "float32"),
        None,
    )
    assert torch_served.table is not None
    assert onnx_served.table is not None
    assert (torch_served.table.backend, onnx_served.table.backend) == ("torch", "onnx")
    assert onnx_served.vocab_size == torch_served.vocab_size


def test_threads_are_shared_out_among_batches(
    plain: Path, graphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(directory: Path, **settings: Any) -> tuple[int, int | None]:
        served = load_model(Settings(model_id=directory, **settings))
        return served.engine_workers, served.torch_threads

    # As many batches as threads where there are few, one where there are many, or what was asked.
    by_default = [shared(plain, threads=count) for count in (1, 2, 4, 5)]
    assert by_default == [(1, 1), (2, 1), (4, 1), (1, 5)]
    assert shared(plain, threads=8, engine_workers=3) == (3, 2)
    assert shared(graphs, threads=2) == (2, None)
    pools: list[int] = []
    monkeypatch.setattr("offramp_model.onnx_stack._share", pools.append)
    for workers in (1, 2, 4):
        shared(graphs, threads=4, engine_workers=workers)
    assert set(pools) == {4, 3, 1}  # each worker computes as well
    with pytest.raises(ValueError, match="engine_workers 3 leaves some without a thread"):
        Settings(model_id=plain, threads=2, engine_workers=3)


def test_one_batch_at_a_time_on_a_cuda_device(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp_service.served_model._has_cuda", lambda: True)
    with pytest.raises(SettingsError, match="--engine-workers 2: a CUDA device computes one"):
        load_model(Settings(model_id=plain, threads=2, engine_workers=2))


def test_int8_graphs_stay_on_the_cpu(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "dtype", property(lambda _: "int8"))
    with pytest.raises(SettingsError, match=r"the int8 graphs of .* run on the CPU"):
        load_model(Settings(model_id=graphs, device="cuda"))


def test_a_device_that_is_not_there_is_refused(plain: Path, graphs: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert load_model(Settings(model_id=plain)).device == "cpu"
    with pytest.raises(SettingsError, match="torch sees no CUDA device; allowed here: auto, cpu"):
        load_model(Settings(model_id=plain, device="cuda"))
    assert load_model(Settings(model_id=graphs)).tensor_device == "cpu"
    with pytest.raises(CheckpointError, match=r"CUDAExecutionProvider"):
        load_model(Settings(model_id=graphs, device="cuda"))


def test_survival_is_read_off_the_calibration(plain: Path) -> None:
    model = load_model(Settings(model_id=plain))
    assert model.table is not None
    assert model.survival(1.0) == [1.0, 1.0, 1.0, 0.0]
    shares = model.survival(1e6)
    counts = model.table.points[-1].exit_counts
    assert shares == [1 - sum(counts[:layer]) / sum(counts) for layer in (1, 2, 3, 4)]
    assert replace(model, table=None).survival(2.0) == [1.0, 1.0, 1.0, 0.0]


def test_a_table_of_another_backend_does_not_count(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uncalibrated = export_onnx(load_checkpoint(plain), tmp_path / "new", measured_on=None)
    with caplog.at_level(logging.WARNING):
        served = load_model(Settings(model_id=uncalibrated.directory, threads=1))
    assert served.table is None
    assert served.max_speedup == 1.0
    assert "no calibration of confidence/onnx/float32; it has: confidence/torch/" in caplog.text


def test_what_a_directory_is_not_for_is_refused(plain: Path, graphs: Path) -> None:
    for directory, wrong, message in (
        (plain, {"backend": "onnx"}, "--backend onnx: .* holds no ONNX graphs; `offramp-train"),
        (graphs, {"backend": "torch"}, "--backend torch: .* allowed: auto, onnx"),
        (graphs, {"dtype": "int8"}, "--dtype int8: the graphs of .* are float32"),
        (plain, {"dtype": "int8"}, "backend torch has no int8"),
    ):
        with pytest.raises(SettingsError, match=message):
            load_model(Settings(model_id=directory, threads=1, **wrong))


async def test_graphs_answer_as_torch_does(plain: Path, graphs: Path) -> None:
    texts = support.random_texts(20, seed=9)
    app = create_app(Settings(model_id=graphs, backend="onnx", threads=1))
    async with (
        LifespanManager(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tiny") as client,
    ):
        info = (await client.get("/info")).json()
        body = {"input": texts, "speedup": 1.5, "return_signals": True}
        answers = (await client.post("/classify", json=body)).json()["data"]
        full = (await client.post("/classify", json={"input": texts})).json()["data"]
    assert (info["backend"], info["model_dtype"]) == ("onnx", "float32")
    assert info["calibration"]["backend"] == "onnx"
    assert {item["details"]["exit_layer"] for item in answers} - {support.LAYERS}
    for item in answers:
        assert len(item["details"]["signals"]) == item["details"]["exit_layer"]
    checkpoint = load_checkpoint(plain)
    recorded = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(texts))
    expected = [support.LABELS[label] for label in recorded.logits[-1].argmax(-1).tolist()]
    assert [item["label"] for item in full] == expected


LOADED = """
import json, sys
from pathlib import Path
from offramp_service.app import create_app
from offramp_service.settings import Settings
create_app(Settings(model_id=Path(sys.argv[1]), threads=1))
names = ("onnx", "onnxruntime", "torch", "transformers")
print(json.dumps([name for name in names if name in sys.modules]))
"""


@pytest.mark.parametrize(("which", "loaded"), [("plain", ["torch"]), ("graphs", ["onnxruntime"])])
def test_only_what_the_backend_needs_is_imported(
    which: str, loaded: list[str], request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(which)
    command = [sys.executable, "-c", LOADED, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == loaded
