"""Packing, compaction of everything per row, policies' rules, configuration, tokenizer."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp_model import signals
from offramp_model.config import MultiExitConfig, PolicyOptions
from offramp_model.policies import (
    POLICIES,
    HeadOutput,
    VotePolicy,
    make_policy,
    make_supported_policy,
    never,
    threshold_range,
)
from offramp_model.recorded import RecordedExits, RecordedStack, record_exits, replay
from offramp_model.rows import ActiveRows, Encoding, PackedTokens, RowSettings, TokenBatch
from offramp_model.speed import count_exits, mean_exit_layer
from offramp_model.tokenizer import InputTooLong, TextTokenizer


@given(lengths=st.lists(st.integers(1, 9), max_size=12))
def test_packing_keeps_every_token(lengths: list[int]) -> None:
    encodings = [
        Encoding([100 * row + place for place in range(length)], [row % 2] * length)
        for row, length in enumerate(lengths)
    ]
    batch = TokenBatch.pack(encodings)
    offsets = batch.cu_seqlens.tolist()
    assert batch.num_tokens == sum(lengths)
    assert offsets[0] == 0
    for packed, submitted in enumerate(batch.order.tolist()):
        tokens = slice(offsets[packed], offsets[packed + 1])
        assert batch.input_ids[tokens].tolist() == encodings[submitted].ids
        assert batch.type_ids[tokens].tolist() == encodings[submitted].type_ids
        assert batch.positions[tokens].tolist() == list(range(lengths[submitted]))
    runs = PackedTokens(torch.zeros(batch.num_tokens, 1), batch.cu_seqlens).runs
    assert [run.length for run in runs] == sorted(set(lengths))
    assert sum(run.rows for run in runs) == len(lengths)
    assert all(left.stop == right.start for left, right in itertools.pairwise(runs))


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        TokenBatch.pack([Encoding([1], [0]), Encoding([], [])])


LIBRARIES = pytest.mark.parametrize(
    "library", [np.asarray, torch.as_tensor], ids=["numpy", "torch"]
)


@LIBRARIES
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=10), data=st.data())
def test_keep_drops_a_row_from_everything(
    library: Any, lengths: list[int], data: st.DataObject
) -> None:
    count = len(lengths)
    batch = TokenBatch.pack([Encoding([row] * n, [0] * n) for row, n in enumerate(lengths)])
    order = library(batch.order)
    rows = ActiveRows(
        hidden=PackedTokens(
            library(batch.input_ids[:, None].astype(np.float64)), library(batch.cu_seqlens)
        ),
        row=order,
        threshold=library(batch.order / 10),
        min_layer=order + 1,
        max_layer=order + 100,
        alive=library(np.ones(count, np.bool)),
        state={"memory": library(np.repeat(batch.order[:, None], 3, axis=1))},
    )
    for _ in range(2):
        flags = data.draw(st.lists(st.booleans(), min_size=rows.num_rows, max_size=rows.num_rows))
        stays = library(np.array(flags, np.bool))
        expected = rows.row[stays].tolist()
        rows.keep(stays)
        assert rows.row.tolist() == expected
        assert rows.threshold.tolist() == [row / 10 for row in expected]
        assert rows.min_layer.tolist() == [row + 1 for row in expected]
        assert rows.max_layer.tolist() == [row + 100 for row in expected]
        assert rows.state["memory"][:, 0].tolist() == expected
        assert rows.hidden.lengths.tolist() == [lengths[row] for row in expected]
        assert rows.hidden.values[:, 0].tolist() == [
            row for row in expected for _ in range(lengths[row])
        ]


def test_patience_counts_agreements_in_a_row() -> None:
    said = [0, 0, 1, 1, 1, 1]
    logits = torch.nn.functional.one_hot(torch.tensor(said), 2).float()[:, None]
    recorded = RecordedExits(logits, (1, 2, 3, 4, 5, 6))
    for patience, expected in ((0, 1), (1, 2), (2, 5), (3, 6), (4, 6)):
        outcome = replay(recorded, make_policy("patience"), float(patience))
        assert int(outcome.exit_layer) == expected, patience


@pytest.mark.parametrize(
    ("name", "logits", "tie"),
    [
        ("confidence", [0.0, 0.0], 0.5),
        ("margin", [0.0, 0.0], 0.0),
        ("entropy", [0.0, 0.0], 1.0),
        ("energy", [0.0, 0.0], 1 / 3),
    ],
)
def test_a_tie_stays_and_the_next_float_leaves(name: str, logits: list[float], tie: float) -> None:
    policy = make_policy(name)
    recorded = RecordedExits(torch.tensor([[logits], [logits]]), (1, 2))
    signal = float(replay(recorded, policy, never(policy)).signal)
    assert signal == pytest.approx(tie)
    assert int(replay(recorded, policy, signal).exit_layer) == 2
    towards = 2.0 if policy.direction == "below" else -2.0
    nearest = torch.nextafter(torch.tensor(signal), torch.tensor(towards))
    assert int(replay(recorded, policy, float(nearest)).exit_layer) == 1


def test_thresholds_are_compared_in_the_signals_own_dtype() -> None:
    # 0.9 in float32 is a little below 0.9 in float64; a signal of exactly 0.9f must tie.
    logits = torch.tensor([[[0.0, float(torch.logit(torch.tensor(0.9)))]]] * 2)
    signal = torch.softmax(logits, -1).amax(-1)[0]
    outcome = replay(RecordedExits(logits, (1, 2)), make_policy("confidence"), float(signal))
    assert int(outcome.exit_layer) == 2


def test_min_layer_holds_back_and_max_layer_forces() -> None:
    recorded = RecordedExits(torch.randn(5, 4, 2), (1, 2, 3, 4, 5))
    policy = make_policy("confidence")
    assert replay(recorded, policy, 0.0, min_layer=3).exit_layer.eq(3).all()
    assert replay(recorded, policy, never(policy), max_layer=2).exit_layer.eq(2).all()
    assert replay(recorded, policy, 0.0, min_layer=2, max_layer=2).exit_layer.eq(2).all()


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown exit policy 'hope'; known: full_depth, fixed_layer"
    ):
        make_policy("hope")


@pytest.mark.parametrize("exponent", [-0.1, 1.0, 2.0])
def test_a_vote_exponent_out_of_range_is_refused(exponent: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        VotePolicy(exponent=exponent)


@pytest.mark.parametrize("name", POLICIES)
def test_never_and_the_range_of_thresholds(name: str) -> None:
    config = MultiExitConfig(num_layers=3, hidden_size=4, exit_layers=(1, 2, 3), labels=("a", "b"))
    low, high = threshold_range(make_policy(name), config)
    assert low < high
    assert abs(never(make_policy(name))) == float("inf")


@LIBRARIES
def test_policies_decide_for_no_rows(library: Any) -> None:
    def none(dtype: Any, *width: int) -> Any:
        return library(np.zeros((0, *width), dtype))

    for name in POLICIES:
        policy = make_policy(name)
        empty = ActiveRows(
            hidden=PackedTokens(none(np.float32, 1), library(np.zeros(1, np.int32))),
            row=none(np.int64),
            threshold=none(np.float64),
            min_layer=none(np.int64),
            max_layer=none(np.int64),
            alive=none(np.bool),
            state=policy.initial_state(0, 2, none(np.int64)),
        )
        head = HeadOutput(none(np.float32, 2), none(np.float32))
        assert policy.decide(1, head, empty).leaving.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layers": ()}, "exit_layers is empty"),
        ({"exit_layers": (2, 1, 4)}, "must be ascending"),
        ({"exit_layers": (0, 4)}, "must be ascending"),
        ({"exit_layers": (1, 2)}, "the last exit is at layer 2"),
        ({"labels": ("a",)}, "at least two different names"),
        ({"labels": ("a", "a")}, "at least two different names"),
        ({"pooling": "max"}, "'cls', 'mean', 'mean_cls', 'max_mean' or 'attention'"),
        ({"pooling": "attention", "attention_heads": 3}, "3 does not divide hidden_size = 8"),
        ({"colour": 1}, "Extra inputs are not permitted"),
        ({"gate_hidden": -1}, "greater than or equal to 0"),
        ({"gate_hidden": 4, "exit_layers": (4,)}, "there is only the last one"),
    ],
)
def test_an_impossible_model_is_refused(changes: dict[str, Any], message: str) -> None:
    good = {"num_layers": 4, "hidden_size": 8, "exit_layers": (2, 4), "labels": ("a", "b")}
    with pytest.raises(ValueError, match=message):
        MultiExitConfig(**(good | changes))


def test_speed_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        mean_exit_layer([0, 0])
    with pytest.raises(ValueError, match=r"exit layer 5 is outside 1\.\.4"):
        count_exits([1, 5], 4)


def test_recorded_exits_check_their_shape() -> None:
    with pytest.raises(ValueError, match=r"\[2 exits, rows, classes\]"):
        RecordedExits(torch.zeros(3, 1, 2), (1, 2))
    with pytest.raises(ValueError, match=r"gate must be \[2, 1\]"):
        RecordedExits(torch.zeros(2, 1, 2), (1, 2), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="no texts"):
        record_exits(RecordedStack(RecordedExits(torch.zeros(1, 1, 2), (1,))), [])


def test_the_last_exit_can_be_recorded_alone() -> None:
    asked = []

    class Asked(RecordedStack):
        def exit_head(self, exit_layer: int, hidden: PackedTokens) -> HeadOutput:
            asked.append(exit_layer)
            return super().exit_head(exit_layer, hidden)

    logits = torch.randn(3, 5, 2)
    stack = Asked(RecordedExits(logits, (1, 2, 4), torch.rand(3, 5)))
    rows = [Encoding([row], [0]) for row in (3, 0, 4, 1, 2)]
    recorded = record_exits(stack, rows, batch_size=2, last_only=True)
    assert (recorded.exit_layers, asked) == ((4,), [4, 4, 4])
    assert recorded.logits.equal(logits[-1:, [3, 0, 4, 1, 2]])
    assert recorded.gate is not None
    assert recorded.gate.shape == (1, 5)


def test_settings_follow_the_order() -> None:
    settings = RowSettings(np.array([0.1, 0.2]), np.array([1, 2]), np.array([3, 4]))
    swapped = settings.at(np.array([1, 0]))
    assert swapped.threshold.tolist() == [0.2, 0.1]
    assert swapped.max_layer.tolist() == [4, 3]


@pytest.fixture
def tokenizer(tmp_path: Path, write_tiny: Any) -> TextTokenizer:
    directory = write_tiny(tmp_path / "model")
    return TextTokenizer(directory / "tokenizer.json", max_length=6)


def test_long_texts_are_cut_or_refused(tokenizer: TextTokenizer) -> None:
    long = " ".join(f"w{n}" for n in range(4, 20))
    (cut,) = tokenizer.encode([long])
    assert cut.ids == [2, 4, 5, 6, 7, 3]
    (left,) = tokenizer.encode([long], side="left")
    assert left.ids == [2, 16, 17, 18, 19, 3]
    (short,) = tokenizer.encode([long], max_length=4)
    assert short.ids == [2, 4, 5, 3]
    assert tokenizer.encode([long])[0].ids == cut.ids  # a custom limit leaves no trace
    with pytest.raises(InputTooLong, match="text 1 has 18 tokens, at most 6 are allowed"):
        tokenizer.encode(["w4", long], truncate=False)
    with pytest.raises(ValueError, match="max_length 7 is more than the model's 6"):
        tokenizer.encode(["w4"], max_length=7)


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        TextTokenizer(tmp_path / "tokenizer.json", 8)


def test_the_vocabulary_has_an_end(tokenizer: TextTokenizer) -> None:
    assert tokenizer.largest_id == 49


def test_policies_are_made_as_the_model_says() -> None:
    options = PolicyOptions(temperature=2.0, vote_exponent=0.5, vote_fallback="majority")
    config = MultiExitConfig(
        num_layers=2, hidden_size=4, exit_layers=(1, 2), labels=("a", "b"), policies=options
    )
    logits = torch.tensor([[2.0, 0.0], [-1.0, 3.0]])
    for name, signal in {
        "confidence": signals.max_probability,
        "margin": signals.margin,
        "entropy": signals.normalised_entropy,
        "energy": signals.energy,
    }.items():
        policy = make_supported_policy(name, config)
        rows: Any = SimpleNamespace(threshold=torch.zeros(2, dtype=torch.float64))
        found = policy.decide(1, HeadOutput(logits), rows).signal
        assert found.equal(signal(logits, 2.0)), name
        assert not found.equal(make_policy(name).decide(1, HeadOutput(logits), rows).signal)
    assert make_supported_policy("vote", config) == VotePolicy(0.5, "majority")
    assert make_policy("vote") == VotePolicy(0.75, "last")
