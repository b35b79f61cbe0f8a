"""`fit` in two processes, started by the real launchers, ends as it does in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from loading import load
from offramp_model.checkpoint import load_checkpoint
from offramp_training import seeds
from offramp_training.resume import load_tree

SCRIPT = Path(__file__).with_name("train_launched.py")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "joint": {},
    "ensemble": {"lambda": 0.5},
    "consistentee": {
        "stage1_epochs": 1,
        "stage2_epochs": 2,
        "stage3_epochs": 1,
        "stage2_lr": 1e-2,
        "stage1_lr": 1e-3,
        "stage3_lr": 1e-3,
    },
    "cosee": {"alpha": 0.5},
    "l2w": {"meta_lr": 1e-3},
}


@pytest.fixture(scope="module")
def without_dropout(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone, with no dropout of its own."""
    directory = tmp_path_factory.mktemp("plain")
    for file in backbone.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = AutoConfig.from_pretrained(directory)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def runs(without_dropout: Path, backbone: Path) -> dict[str, dict[str, Any]]:
    """Recipes by name. Their last batches have 7 rows, which makes shares of 4 and 3; with
    ConsistentEE 3, which are too few to share."""
    tables = {}
    for name, options in OBJECTIVES.items():
        tables[name] = {
            "model": {"backbone": str(without_dropout), "max_length": 16, "head_dropout": 0.0},
            "objective": {"name": name, **options},
            "optimiser": {"lr": 1e-3, "head_lr": 1e-3},
            "loop": {
                "epochs": 2,
                "batch_size": 16,
                "max_train_rows": 67 if name == "consistentee" else 55,
                "evaluate_every_steps": 3,
                "threads": 1,
            },
        }
    tables["dropout"] = {
        "model": {"backbone": str(backbone), "max_length": 16},
        "loop": {"epochs": 2, "max_train_rows": 90, "checkpoint_every_steps": 2, "batch_size": 16},
    }
    tables["stopped"] = {
        **tables["dropout"],
        "loop": {"epochs": 500, "max_minutes": 0.01, "batch_size": 16},
    }
    return tables


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with two processes on this machine's CPU.

    They talk over loopback; only the rendezvous, torch's own, cannot be told to listen there.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--main_process_ip", "127.0.0.1"]
    launcher += ["--main_process_port", str(free_port())]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*launcher, *command], env=environment, text=True, capture_output=True, check=False
    )


@pytest.fixture(scope="module")
def launched(runs: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    (directory / "runs.json").write_text(json.dumps(runs))
    done = launch(str(SCRIPT), str(directory), str(data))
    assert done.returncode == 0, done.stderr[-4000:]
    (directory / "stderr").write_text(done.stderr)
    return directory


@pytest.fixture(scope="module")
def alone(runs: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = load("tests/integration/train_launched.py")
    directory = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Run, "clip", script.CLIP)  # undone when all have run
        patch.setattr(script.fitting, "train", script.TRAIN)
        script.run_all({name: runs[name] for name in OBJECTIVES}, str(data), directory)
    return directory


def kept(directory: Path, name: str, rank: int) -> Any:
    return load_tree(directory / "kept" / name / str(rank))


def assert_near(found: Any, expected: Any, key: str, tolerance: float) -> None:
    """Trees of the same form, tensors and numbers alike but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_near(found[name], value, f"{key}/{name}", tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), key
        for place, value in enumerate(expected):
            assert_near(found[place], value, f"{key}/{place}", tolerance)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            found, expected, atol=tolerance, rtol=1e-4, msg=lambda m: f"{key} {m}"
        )
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=tolerance), key
    else:
        assert found == expected, key


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_end_as_one(launched: Path, alone: Path, name: str) -> None:
    expected = kept(alone, name, 0)
    steps, _ = expected.pop("steps"), expected.pop("seed")
    assert len(steps) >= 6
    for rank in (0, 1):
        found = kept(launched, name, rank)
        assert found.pop("seed") == (seeds.number(0, "dropout", rank) if rank else 0)
        for mine, theirs in zip(found.pop("steps"), steps, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert_near(found, expected, name, 1e-5)


@pytest.mark.timeout(240)
def test_a_killed_run_of_two_ends_with_the_same_bits(launched: Path) -> None:
    for rank in (0, 1):
        whole, killed = kept(launched, "dropout", rank), kept(launched, "killed", rank)
        for name, value in whole["weights"].items():
            assert torch.equal(killed["weights"][name], value), name
        assert killed["accuracies"] == whole["accuracies"]
    # Each process drops units of its own, and all of them end with the same weights.
    one, other = (kept(launched, "dropout", rank)["weights"] for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.timeout(240)
def test_both_stop_when_time_is_up(launched: Path) -> None:
    steps = [kept(launched, "stopped", rank)["position"] for rank in (0, 1)]
    assert steps[0] == steps[1] < 5000


@pytest.mark.timeout(240)
def test_what_one_refuses_ends_both_with_one_message(launched: Path) -> None:
    for rank in (0, 1):
        assert "/nowhere" in (launched / f"refused-{rank}").read_text()
        assert (launched / f"status-{rank}").read_text() == "2"
    lines = (launched / "stderr").read_text().splitlines()
    assert sum(line.startswith("offramp-train: loop.epochs = 0") for line in lines) == 1


@pytest.mark.timeout(240)
def test_the_command_writes_and_says_all_once(tmp_path: Path, backbone: Path, data: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        f"[model]\nbackbone = '{backbone}'\nmax_length = 16\n[loop]\nepochs = 1\n", encoding="utf-8"
    )
    output = tmp_path / "made"
    done = launch("-m", "offramp_training", "fit", str(tmp_path / "recipe.toml"),
                  "--data", str(data), "--output", str(output))  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("checkpoint:") == 1
    assert done.stderr.count("held-out accuracy by exit") == 1
    assert load_checkpoint(output).manifest.evaluation["rows"] == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "recipe.toml"]
