"""`fit` on two machines: two launchers that know nothing of each other but an address and a port.

Both are on this machine and meet over loopback. Otherwise it is what docs/train-multi-node.md has
people type, with the configuration file of the repository.
"""

import os
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from loading import ROOT, load
from offramp_model.checkpoint import load_checkpoint

two = load("tests/integration/test_two_processes.py")
without_dropout = two.without_dropout

CONFIG = ROOT / "training" / "launch" / "two-nodes.yaml"
PATIENCE_S = 120

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def start(rank: int, port: int, *command: str) -> subprocess.Popen[str]:
    """The launcher of one machine, with one process."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    launcher += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
    launcher += ["--main_process_port", str(port), "--num_processes", "2"]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*launcher, "-m", "offramp_training", *command],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def both(*command: str) -> list[subprocess.Popen[str]]:
    port = two.free_port()
    return [start(rank, port, *command) for rank in (0, 1)]


def end(machines: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What they said, when both have ended."""
    try:
        return [one.communicate(timeout=PATIENCE_S) for one in machines]
    finally:
        for one in machines:
            kill(one)


def kill(machine: subprocess.Popen[str]) -> None:
    """At once, with all its processes, which the launcher puts into sessions of their own."""
    if machine.poll() is None:
        for process in psutil.Process(machine.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        machine.kill()
        machine.wait()


def recipe(directory: Path, backbone: Path, **loop: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"[model]\nbackbone = '{backbone}'\nmax_length = 16\nhead_dropout = 0.0", "[loop]"]
    lines += [f"{name} = {value}" for name, value in loop.items()]
    file = directory / "recipe.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "exits.safetensors")


def test_two_machines_train_what_one_process_does(
    tmp_path: Path, without_dropout: Path, data: Path
) -> None:
    file = recipe(tmp_path / "recipe", without_dropout, epochs=2, batch_size=16, threads=1)
    fit = ("fit", str(file), "--data", str(data), "--output")
    machines = both(*fit, str(tmp_path / "two"))
    (said, told), (also_said, also_told) = end(machines)
    assert [one.returncode for one in machines] == [0, 0], (told[-3000:], also_told[-3000:])
    # Each machine's terminal says where the checkpoint is; one of them shows how it came about.
    assert said.count("checkpoint:") == also_said.count("checkpoint:") == 1
    assert "held-out accuracy" in told
    assert "held-out accuracy" not in also_told
    alone = [sys.executable, "-m", "offramp_training", *fit, str(tmp_path / "one")]
    subprocess.run(alone, check=True, capture_output=True)
    one, of_both = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == of_both.keys()
    for name, value in one.items():
        torch.testing.assert_close(of_both[name], value, atol=1e-5, rtol=1e-4, msg=name)
    manifests = [load_checkpoint(tmp_path / name).manifest for name in ("one", "two")]
    assert manifests[0].evaluation["rows"] == manifests[1].evaluation["rows"]


def test_a_run_that_lost_a_machine_goes_on_to_the_same_bits(
    tmp_path: Path, backbone: Path, data: Path
) -> None:
    """With dropout, so that every process's own draws go on where they stood."""
    loop = {"epochs": 12, "batch_size": 16, "checkpoint_every_steps": 2, "threads": 1}
    file = recipe(tmp_path / "recipe", backbone, **loop)
    fit = ("fit", str(file), "--data", str(data), "--output")
    assert all(one == 0 for one in codes(both(*fit, str(tmp_path / "whole"))))

    machines = both(*fit, str(tmp_path / "killed"))
    wait_for_point(tmp_path, machines)
    kill(machines[1])
    end(machines)
    assert machines[0].returncode != 0  # it cannot train alone, and does not wait for ever
    assert not (tmp_path / "killed").exists()

    machines = both(*fit, str(tmp_path / "killed"))
    (_, told), _ = end(machines)
    assert [one.returncode for one in machines] == [0, 0], told[-3000:]
    first, second = (steps(file) for file in events(tmp_path / "killed"))
    assert first[0] < second[0]  # it did not start anew
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name, value in whole.items():
        assert torch.equal(killed[name], value), name


def events(checkpoint: Path) -> list[Path]:
    """Of each start of the run, in order."""
    return sorted((checkpoint / "tensorboard").glob("events.*"))


def steps(file: Path) -> list[int]:
    """At which something was noted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tensorboard's own imports
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        return [one.step for one in EventFileLoader(str(file)).Load() if one.HasField("summary")]


def codes(machines: list[subprocess.Popen[str]]) -> list[int]:
    said = end(machines)
    assert all(one.returncode == 0 for one in machines), said[0][1][-3000:]
    return [one.returncode for one in machines]


def wait_for_point(directory: Path, machines: list[subprocess.Popen[str]]) -> None:
    """Until there is something to go on from."""
    deadline = time.monotonic() + PATIENCE_S
    while not list(directory.glob("*killed*/**/state.json")):
        assert time.monotonic() < deadline, "no resume point"
        assert all(one.poll() is None for one in machines), "the run ended too soon"
        time.sleep(0.02)
