"""Multi-label models: sets as bits, signals of sets, and figures against slow twins by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loading import load
from offramp_model.calibrating import curve, layer_accuracies, oracle, set_macro_f1, trace
from offramp_model.checkpoint import CheckpointError, load_checkpoint, update_manifest
from offramp_model.config import MOST_LABELS_OF_SETS, MultiExitConfig
from offramp_model.encoder import PackedEncoder
from offramp_model.labels import bits_of, from_bits, ids_of, label_set, reading, to_bits
from offramp_model.policies import (
    LABEL_SET_POLICIES,
    POLICIES,
    make_policy,
    make_supported_policy,
    never,
    supported_policies,
    threshold_range,
)
from offramp_model.recorded import RecordedExits, record_exits, replay
from offramp_model.rows import Encoding, RowSettings
from offramp_model.signals import least_certain, least_margin, mean_binary_entropy

SETS = "multi_label_classification"
EXITS = (1, 2, 4, 6)
EARLY = [name for name in LABEL_SET_POLICIES if name != "full_depth"]
seeds = st.integers(0, 2**31)
memberships = st.lists(st.booleans(), min_size=1, max_size=MOST_LABELS_OF_SETS)
logit_rows = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12)


def config(**changes: Any) -> MultiExitConfig:
    good = {"num_layers": 6, "hidden_size": 8, "exit_layers": EXITS, "labels": ("a", "b", "c")}
    return MultiExitConfig(**(good | {"problem_type": SETS} | changes))


def policy_of(name: str) -> Any:
    return make_supported_policy(name, config())


def recorded(seed: int = 0, rows: int = 40, labels: int = 3) -> RecordedExits:
    """Logits that grow surer from exit to exit."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None]
    drawn = torch.randn(len(EXITS), rows, labels, generator=generator)
    return RecordedExits(drawn * scale, EXITS, problem_type=SETS)


def true_sets(seed: int = 1, rows: int = 40, labels: int = 3) -> torch.Tensor:
    return torch.randint(2**labels, (rows,), generator=torch.Generator().manual_seed(seed))


# ---- sets as bits --------------------------------------------------------------------------------


@given(members=memberships)
def test_a_set_is_its_bits(members: list[bool]) -> None:
    bits = to_bits(torch.tensor(members))
    assert bits >= 0
    assert from_bits(bits, len(members)).tolist() == members
    ids = [label for label, inside in enumerate(members) if inside]
    assert bits_of(ids) == int(bits)
    assert ids_of(int(bits)) == ids


def test_sets_of_many_rows_and_exits() -> None:
    logits = torch.tensor([[[1.0, -1.0, 0.0], [-1.0, 2.0, 3.0]]])
    assert label_set(logits).tolist() == [[0b001, 0b110]]
    assert reading(SETS)(logits).tolist() == [[0b001, 0b110]]
    assert reading("single_label_classification")(logits).tolist() == [[0, 2]]


@given(logits=logit_rows)
def test_a_label_is_in_the_set_when_its_probability_is_above_a_half(logits: list[float]) -> None:
    exact = [1 / (1 + math.exp(-max(min(z, 700.0), -700.0))) for z in logits]
    said = from_bits(label_set(torch.tensor(logits)), len(logits)).tolist()
    for z, p, inside in zip(logits, exact, said, strict=True):
        assert inside == (z > 0)
        if abs(p - 0.5) > 1e-9:
            assert inside == (p > 0.5)


# ---- signals -------------------------------------------------------------------------------------


def by_hand(logits: list[float], temperature: float) -> tuple[float, float, float]:
    """Confidence, margin, entropy in float64, label by label."""
    sure, margins, entropies = [], [], []
    for z in logits:
        p = 1 / (1 + math.exp(-abs(z) / temperature)) if abs(z) / temperature < 700 else 1.0
        q = math.exp(-abs(z) / temperature) * p  # 1 - p without rounding
        sure.append(max(p, q))
        margins.append(abs(p - q))
        entropies.append(-sum(x * math.log(x) for x in (p, q) if x > 0))
    return min(sure), min(margins), sum(entropies) / len(logits) / math.log(2)


@given(logits=logit_rows, temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_signals_are_those_of_the_labels(logits: list[float], temperature: float) -> None:
    given_ = torch.tensor(logits)
    confidence, margin, entropy = by_hand(given_.double().tolist(), temperature)
    assert float(least_certain(given_, temperature)) == pytest.approx(confidence, abs=1e-6)
    assert float(least_margin(given_, temperature)) == pytest.approx(margin, abs=1e-6)
    assert float(mean_binary_entropy(given_, temperature)) == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize("signal", [least_certain, least_margin, mean_binary_entropy])
@given(logits=logit_rows, at=st.integers(0, 11))
def test_signals_are_finite_in_range_and_nan_for_nan(
    signal: Any, logits: list[float], at: int
) -> None:
    found = float(signal(torch.tensor(logits)))
    assert (0.5 if signal is least_certain else 0.0) <= found <= 1.0 + 1e-6
    logits[at % len(logits)] = math.nan
    assert math.isnan(float(signal(torch.tensor(logits))))
    assert signal(torch.tensor([logits], dtype=torch.bfloat16)).dtype == torch.float32
    assert signal(torch.tensor([logits], dtype=torch.float64)).dtype == torch.float64


# ---- policies ------------------------------------------------------------------------------------


def test_what_a_multi_label_model_supports() -> None:
    names = ("full_depth", "fixed_layer", "confidence", "margin", "entropy", "patience")
    assert supported_policies(config()) == names
    for name in names:
        policy = policy_of(name)
        assert policy.name == name
        assert policy.direction == make_policy(name).direction
        assert threshold_range(policy, config())[0] <= threshold_range(policy, config())[1]
    for name in set(POLICIES) - set(names):
        with pytest.raises(ValueError, match=f"'{name}' is for one label a text.*full_depth, fix"):
            policy_of(name)
    with pytest.raises(ValueError, match="unknown exit policy 'hope'; known: full_depth, fixed_l"):
        policy_of("hope")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ()}, "1 to 63 different names, got 0"),
        ({"labels": ("a", "a")}, "1 to 63 different names"),
        ({"labels": tuple(map(str, range(64)))}, "1 to 63 different names, got 64"),
        ({"gate_hidden": 4}, "gates are learned for one label a text"),
        ({"problem_type": "regression"}, "'single_label_classification' or 'multi_label"),
        (
            {"labels": ("a",), "problem_type": "single_label_classification"},
            "a single label goes with problem_type multi_label_classification",
        ),
    ],
)
def test_an_impossible_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_one_label_is_yes_or_no() -> None:
    assert config(labels=("spam",)).num_labels == 1
    one = RecordedExits(torch.tensor([[[3.0], [-3.0], [0.1]]]), (1,), problem_type=SETS)
    assert one.said.tolist() == [[1, 0, 0b1]]
    assert least_certain(one.logits)[0].tolist() == pytest.approx(
        [0.9526, 0.9526, 0.5250], abs=1e-4
    )


def test_patience_counts_sets_that_stay_the_same() -> None:
    said = [[1.0, -1.0], [2.0, -0.5], [0.5, 0.5], [3.0, 4.0]]  # {0}, {0}, {0, 1}, {0, 1}
    one = RecordedExits(torch.tensor(said)[:, None], EXITS, problem_type=SETS)
    assert replay(one, policy_of("patience"), 1.0).exit_layer.tolist() == [2]
    assert replay(one, policy_of("patience"), 1.0).label.tolist() == [0b01]
    assert replay(one, policy_of("patience"), 2.0).exit_layer.tolist() == [6]
    # The most probable label is the same throughout: it is the set that must agree.
    moved = RecordedExits(one.logits[1:3], (1, 2), problem_type=SETS)
    assert replay(moved, policy_of("patience"), 1.0).exit_layer.tolist() == [2]
    assert not trace(moved, policy_of("patience")).leaves(1.0).any()


@pytest.mark.parametrize("name", EARLY)
@given(seed=seeds, at=st.integers(0, len(EXITS) - 1))
def test_the_trace_is_the_layer_loop_and_nan_never_leaves(name: str, seed: int, at: int) -> None:
    policy = policy_of(name)
    logits = recorded(seed).logits.clone()
    logits[at, ::3, 1] = torch.nan
    broken = RecordedExits(logits, EXITS, problem_type=SETS)
    seen = trace(broken, policy)
    for threshold in (0.2, 0.6, 0.9, 1.0, 2.0, -never(policy)):
        outcome = replay(broken, policy, threshold)
        exit_layer, label = seen.outcome(threshold)
        assert outcome.exit_layer.equal(exit_layer)
        assert outcome.label.equal(label)
        if name != "fixed_layer" and at < len(EXITS) - 1:
            assert (outcome.exit_layer[::3] != EXITS[at]).all()


def random_texts(seed: int, count: int) -> list[Encoding]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    ids = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths]
    return [Encoding(one, [0] * len(one)) for one in ids]


@pytest.mark.parametrize("name", EARLY)
def test_compaction_and_neighbours_change_no_set(run_loop: Any, name: str) -> None:
    laws, shared = load("tests/unit/model/test_laws.py"), load("tests/unit/model/conftest.py")
    stack = tiny_stack(shared)
    policy, texts = make_supported_policy(name, stack.config), random_texts(3, 12)
    asked = laws.random_settings(12, policy, 4, 5)
    always = run_loop(stack, texts, policy, asked)
    lazy = run_loop(stack, texts, policy, asked, lambda *_: False)
    assert always.exit_layer.equal(lazy.exit_layer)
    assert always.label.equal(lazy.label)
    for row, text in enumerate(texts):
        settings = RowSettings(*(one[row : row + 1] for one in unpacked(asked)))
        alone = run_loop(stack, [text], policy, settings)
        assert int(alone.exit_layer) == int(always.exit_layer[row])
        assert int(alone.label) == int(always.label[row])


def unpacked(asked: RowSettings) -> tuple[Any, ...]:
    return asked.threshold, asked.min_layer, asked.max_layer


def tiny_stack(shared: Any) -> Any:
    model = MultiExitConfig(
        num_layers=shared.LAYERS,
        hidden_size=shared.WIDTH,
        exit_layers=(1, 2, 3, 4),
        labels=("a", "b", "c"),
        problem_type=SETS,
        max_length=40,
    )
    tensors = shared.bert_tensors()
    return PackedEncoder(shared.BACKBONE, tensors.__getitem__, shared.spread_heads(model), model)


def test_exits_are_recorded_as_sets() -> None:
    stack = tiny_stack(load("tests/unit/model/conftest.py"))
    found = record_exits(stack, random_texts(1, 7))
    assert found.problem_type == SETS
    assert found.said.equal(to_bits(found.logits > 0))


# ---- figures against slow twins ------------------------------------------------------------------


def slow_f1(said: list[set[int]], true: list[set[int]]) -> float:
    scores = []
    for label in range(MOST_LABELS_OF_SETS):
        hits = sum(label in a and label in b for a, b in zip(said, true, strict=True))
        wrong = sum((label in a) != (label in b) for a, b in zip(said, true, strict=True))
        if hits or wrong:
            scores.append(2 * hits / (2 * hits + wrong))
    return sum(scores) / len(scores) if scores else 1.0


@given(seed=seeds, rows=st.integers(1, 30), labels=st.sampled_from([1, 3, 20, 62]))
def test_macro_f1_over_labels(seed: int, rows: int, labels: int) -> None:
    said, true = true_sets(seed, rows, labels), true_sets(seed + 1, rows, labels)
    expected = slow_f1(*([set(ids_of(bits)) for bits in sets.tolist()] for sets in (said, true)))
    assert set_macro_f1(said, true) == pytest.approx(expected)


def test_nothing_to_find_is_nothing_missed() -> None:
    none = torch.zeros(4, dtype=torch.int64)
    assert set_macro_f1(none, none) == 1.0
    assert set_macro_f1(none + 1, none) == 0.0


@pytest.mark.parametrize("name", ["confidence", "margin", "entropy", "patience"])
def test_a_curve_is_what_a_loop_over_rows_counts(name: str) -> None:
    exits, true = recorded(), true_sets()
    probabilities = torch.sigmoid(exits.logits.double())
    sets = [
        [{c for c in range(3) if probabilities[e, n, c] > 0.5} for n in range(40)]
        for e in range(len(EXITS))
    ]
    wanted = [set(ids_of(bits)) for bits in true.tolist()]
    for e, accuracy in enumerate(layer_accuracies(exits, true)):
        right = [a == b for a, b in zip(sets[e], wanted, strict=True)]
        assert accuracy == pytest.approx(sum(right) / 40)
    for point in curve(exits, true, policy_of(name), num_points=15):
        left, said = [], []
        for n in range(40):
            e = slow_exit(name, exits.logits[:, n], [one[n] for one in sets], point.threshold)
            left.append(EXITS[e])
            said.append(sets[e][n])
        assert point.exit_counts == tuple(left.count(layer) for layer in range(1, 7))
        assert point.speedup == pytest.approx(6 * 40 / sum(left))
        assert point.accuracy == pytest.approx(
            sum(a == b for a, b in zip(said, wanted, strict=True)) / 40
        )
        assert point.macro_f1 == pytest.approx(slow_f1(said, wanted))


def slow_exit(name: str, logits: torch.Tensor, sets: list[set[int]], threshold: float) -> int:
    """Which exit one row leaves at."""
    streak = 0
    for e in range(len(EXITS)):
        confidence, margin, entropy = by_hand(logits[e].double().tolist(), 1.0)
        streak = streak + 1 if e and sets[e] == sets[e - 1] else 0
        if {
            "confidence": confidence > threshold,
            "margin": margin > threshold,
            "entropy": entropy < threshold,
            "patience": streak >= threshold,
        }[name]:
            return e
    return len(EXITS) - 1


def test_the_oracle_leaves_where_the_whole_set_is_right() -> None:
    said = [[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [1.0, -1.0]]]
    exits = RecordedExits(torch.tensor(said), (1, 2), problem_type=SETS)
    assert oracle(exits, torch.tensor([0b01, 0b01])) == (4 / 3, 1.0)
    assert oracle(exits, torch.tensor([0b01, 0b10])) == (1.0, 0.5)


# ---- checkpoints ---------------------------------------------------------------------------------


def test_older_manifests_say_it_beside_the_model(tmp_path: Path) -> None:
    write = load("tests/unit/service/support.py").write_tiny_checkpoint
    directory = write(tmp_path / "tiny")
    manifest = directory / "offramp.json"
    content = json.loads(manifest.read_text())
    assert content["model"].pop("problem_type") == "single_label_classification"
    content["problem_type"] = "single_label_classification"
    manifest.write_text(json.dumps(content))
    assert load_checkpoint(directory).model.problem_type == "single_label_classification"
    content["problem_type"] = "multi_label_classification"
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="problem_type: Extra inputs are not permitted"):
        load_checkpoint(directory)


def test_a_manifest_names_no_policy_that_sets_do_not_have(tmp_path: Path) -> None:
    write = load("tests/unit/service/support.py").write_tiny_checkpoint
    checkpoint = load_checkpoint(write(tmp_path / "tiny", problem_type=SETS))
    assert checkpoint.model.is_multi_label
    assert {table.policy for table in checkpoint.manifest.calibration} == {"confidence", "entropy"}
    update_manifest(
        checkpoint.directory, checkpoint.manifest.model_copy(update={"exit_policy": "vote"})
    )
    with pytest.raises(CheckpointError, match=r"'vote' is for one label a text.*it supports: full"):
        load_checkpoint(checkpoint.directory)
