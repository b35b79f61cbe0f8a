"""Learned gates: their form, where they sit, which policies they allow, their way to disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp_model.checkpoint import (
    EXITS,
    MANIFEST,
    CheckpointError,
    Manifest,
    file_sha256,
    load_checkpoint,
)
from offramp_model.config import MultiExitConfig, Pooler
from offramp_model.encoder import PackedEncoder
from offramp_model.heads import ExitHeads, Gate
from offramp_model.policies import (
    POLICIES,
    make_policy,
    make_supported_policy,
    never,
    supported_policies,
)
from offramp_model.recorded import RecordedExits, record_exits, replay
from offramp_model.rows import Encoding


def config_with(**changes: Any) -> MultiExitConfig:
    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 16,
        "exit_layers": (1, 2, 3, 4),
        "labels": ("a", "b", "c"),
        "max_length": 32,
    }
    return MultiExitConfig(**(settings | changes))


def test_parameter_counts(oracle_cases: Any) -> None:
    for case in oracle_cases("consistentee", "parameter_count"):
        width, hidden = case["inputs"]["hidden_size"], case["inputs"]["gate_hidden"]
        per_gate = sum(parameter.numel() for parameter in Gate(width, hidden).parameters())
        assert per_gate == case["expected"]["per_gate"]
        exits = case["inputs"]["gates"] + 1  # the last exit is forced and has none
        heads = ExitHeads(
            config_with(
                num_layers=exits,
                hidden_size=width,
                exit_layers=tuple(range(1, exits + 1)),
                gate_hidden=hidden,
            )
        )
        gates = [p.numel() for name, p in heads.named_parameters() if name.startswith("gates.")]
        assert sum(gates) == case["expected"]["total"]
    assert sum(parameter.numel() for parameter in Gate(384, 32).parameters()) == 12_353
    assert sum(parameter.numel() for parameter in Gate(384, 0).parameters()) == 385


def test_a_fresh_gate_is_undecided_and_a_gate_sees_what_the_classifier_sees() -> None:
    for pooler in ("none", "shared", "per_exit"):
        form: Pooler = pooler  # type: ignore[assignment]
        heads = ExitHeads(config_with(gate_hidden=8, pooler=form)).train()
        pooled = torch.randn(6, 16)
        state = heads.state(1, pooled)
        assert state.equal(pooled) == (form == "none")
        chance = heads.exit_probability(1, state)
        assert chance is not None
        assert (chance - 0.5).abs().max() < 0.05
        assert chance.equal(torch.sigmoid(heads.gates[1](state)))  # no dropout before a gate
        forced = heads.exit_probability(3, state)
        assert forced is not None
        assert forced.eq(1).all()


def test_gates_are_added_without_touching_the_heads() -> None:
    torch.manual_seed(3)
    heads = ExitHeads(config_with())
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    assert heads.exit_probability(0, torch.zeros(2, 16)) is None
    heads.add_gates(8)
    after = heads.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())
    assert after.keys() == ExitHeads(config_with(gate_hidden=8)).state_dict().keys()


def test_leaves_above_the_threshold_strictly() -> None:
    gate = torch.tensor([[0.5, 0.5000001, 0.2, torch.nan], [0.5, 0.1, 0.9, torch.nan]])
    recorded = RecordedExits(torch.randn(3, 4, 2), (1, 2, 3), torch.cat([gate, torch.ones(1, 4)]))
    policy = make_policy("gate")
    assert replay(recorded, policy, 0.5).exit_layer.tolist() == [3, 1, 2, 3]
    assert replay(recorded, policy, 1.0).exit_layer.eq(3).all()
    assert replay(recorded, policy, never(policy)).exit_layer.eq(3).all()
    outcome = replay(recorded, policy, 0.5)
    rows = torch.arange(4)
    said = recorded.logits.argmax(-1)[outcome.exit_layer - 1, rows]
    assert outcome.label.equal(said)


def test_a_larger_threshold_never_makes_a_row_leave_earlier() -> None:
    recorded = RecordedExits(torch.randn(6, 200, 2), (1, 2, 3, 4, 5, 6), torch.rand(6, 200))
    previous = torch.zeros(200, dtype=torch.int64)
    for theta in torch.linspace(0, 1, 23).tolist():
        now = replay(recorded, make_policy("gate"), theta).exit_layer
        assert (now >= previous).all()
        previous = now
    assert previous.eq(6).all()


def test_the_stack_records_its_gates(stack: PackedEncoder) -> None:
    encodings = [Encoding(list(range(5, 5 + length)), [0] * length) for length in (7, 1, 3)]
    recorded = record_exits(stack, encodings, batch_size=2)
    assert recorded.gate is not None
    assert recorded.gate.shape == (4, 3)
    assert recorded.gate[-1].eq(1).all()
    alone = [record_exits(stack, [encoding]).gate for encoding in encodings]
    torch.testing.assert_close(recorded.gate, torch.cat([g for g in alone if g is not None], 1))


def test_a_policy_runs_only_where_its_inputs_are() -> None:
    without, with_gates = config_with(), config_with(gate_hidden=0)
    assert supported_policies(with_gates) == tuple(POLICIES)
    assert supported_policies(without) == tuple(name for name in POLICIES if name != "gate")
    assert make_supported_policy("gate", with_gates).name == "gate"
    with pytest.raises(ValueError, match=r"'gate' needs gates.*it supports: full_depth, fixed"):
        make_supported_policy("gate", without)
    with pytest.raises(ValueError, match="unknown exit policy 'hope'"):
        make_supported_policy("hope", without)
    with pytest.raises(ValueError, match="this model has none"):
        replay(RecordedExits(torch.zeros(2, 1, 2), (1, 2)), make_policy("gate"), 0.5)


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_checkpoint_keeps_its_gates(tmp_path: Path, write_tiny: Any, hidden: int) -> None:
    directory = write_tiny(
        tmp_path / "model",
        config_with(gate_hidden=hidden),
        exit_policy="gate",
        exit_threshold=0.5,
    )
    opened = load_checkpoint(directory)
    assert opened.model.gate_hidden == hidden
    assert opened.manifest.exit_threshold == 0.5
    names = load_file(directory / EXITS).keys()
    assert {name for name in names if name.startswith("gates.")} == {
        f"gates.{gate}.{part}.{kind}"
        for gate in range(3)
        for part in (["hidden", "out"] if hidden else ["out"])
        for kind in ("weight", "bias")
    }
    recorded = record_exits(opened.stack(), [Encoding([5, 6], [0, 0])])
    assert recorded.gate is not None


def spoil(directory: Path, change: Any) -> None:
    """Changes the exit tensors and makes the manifest's hash agree."""
    tensors = load_file(directory / EXITS)
    change(tensors)
    save_file(tensors, directory / EXITS)
    content = json.loads((directory / MANIFEST).read_text())
    content["sha256"][EXITS] = file_sha256(directory / EXITS)
    (directory / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("gates.1.out.bias"), r"no tensor gates\.1\.out\.bias"),
        (lambda t: t.update({"gates.3.out.bias": torch.zeros(1)}), r"a tensor gates\.3\.out\.bias"),
        (
            lambda t: t.update({"gates.0.hidden.weight": torch.zeros(9, 16)}),
            r"gates\.0\.hidden\.weight has shape \(9, 16\), but .* gates of width 8 ask",
        ),
    ],
)
def test_damaged_gates_are_named(
    tmp_path: Path, write_tiny: Any, change: Any, message: str
) -> None:
    directory = write_tiny(tmp_path / "model", config_with(gate_hidden=8), exit_policy="gate")
    spoil(directory, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(directory)


def test_a_manifest_cannot_name_a_policy_that_its_model_does_not_support(
    tmp_path: Path, write_tiny: Any
) -> None:
    with pytest.raises(CheckpointError, match=r"'gate' needs gates.*it supports: full_depth"):
        write_tiny(tmp_path / "model", exit_policy="gate")


def test_older_checkpoints_load(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    content = json.loads((directory / MANIFEST).read_text())
    del content["model"]["gate_hidden"], content["exit_threshold"]
    (directory / MANIFEST).write_text(json.dumps(content))
    opened = load_checkpoint(directory)
    assert not opened.model.has_gates
    assert opened.manifest.exit_threshold is None
    assert record_exits(opened.stack(), [Encoding([5], [0])]).gate is None
    assert isinstance(opened.manifest, Manifest)
