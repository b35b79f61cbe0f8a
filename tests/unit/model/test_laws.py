"""The five laws of the layer loop, as properties over random texts, settings and policies."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp_model.calibrating import curve, trace
from offramp_model.encoder import PackedEncoder
from offramp_model.layer_loop import LayerStack, Leavers, every_exit, layer_loop, start_rows
from offramp_model.policies import POLICIES, HeadOutput, make_policy, never
from offramp_model.recorded import RecordedExits, RecordedStack, record_exits, replay
from offramp_model.rows import Encoding, PackedTokens, RowSettings, TokenBatch

EARLY = [name for name in POLICIES if name != "full_depth"]
texts = st.lists(
    st.lists(st.integers(1, 49), min_size=1, max_size=20).map(
        lambda ids: Encoding(ids, [0] * len(ids))
    ),
    min_size=1,
    max_size=12,
)
seeds = st.integers(0, 2**31)


def random_settings(count: int, policy: Any, layers: int, seed: int) -> RowSettings:
    """Thresholds over the whole useful range, some rows never early, some with layer bounds."""
    rng = random.Random(seed)
    top = {"fixed_layer": 5.0, "patience": 4.0, "vote": 1.6, "energy": 0.4}.get(policy.name, 1.0)
    thresholds, lowest, highest = [], [], []
    for _ in range(count):
        thresholds.append(never(policy) if rng.random() < 0.2 else rng.uniform(0.0, top))
        low = rng.choice([1, 1, 1, 2, 3])
        lowest.append(low)
        highest.append(rng.choice([layers, layers, rng.randint(low, layers)]))
    return RowSettings(
        np.array(thresholds, np.float64), np.array(lowest, np.int64), np.array(highest, np.int64)
    )


@pytest.mark.parametrize("name", POLICIES)
@given(encodings=texts, seed=seeds, schedule=st.lists(st.booleans(), min_size=4, max_size=4))
def test_law_1_no_compaction_schedule_changes_an_answer(
    stack: PackedEncoder,
    run_loop: Any,
    name: str,
    encodings: list[Encoding],
    seed: int,
    schedule: list[bool],
) -> None:
    policy = make_policy(name)
    settings = random_settings(len(encodings), policy, 4, seed)
    always = run_loop(stack, encodings, policy, settings)
    other = run_loop(
        stack, encodings, policy, settings, lambda layer, alive, carried: schedule[layer - 1]
    )
    assert always.times.eq(1).all()
    assert other.times.eq(1).all()
    assert always.exit_layer.equal(other.exit_layer)
    assert always.label.equal(other.label)
    torch.testing.assert_close(always.logits, other.logits, rtol=1e-5, atol=1e-5)


def joined_answers(
    stack: LayerStack, encodings: list[Encoding], policy: Any, settings: RowSettings, at: int
) -> tuple[dict[int, int], dict[int, int]]:
    """Exit layer and label of each row when the batch's halves run alone through the first `at`
    exits and together from there on."""
    half = len(encodings) // 2
    rows, turns = [], []
    for index in (np.arange(half), np.arange(half, len(encodings))):
        batch = TokenBatch.pack([encodings[row] for row in index.tolist()])
        rows.append(start_rows(stack, batch, policy, settings.at(index)))
        turns.append(layer_loop(stack, rows[-1], policy))
    layers: dict[int, int] = {}
    labels: dict[int, int] = {}

    def note(left: Leavers, offset: int) -> None:
        found = (left.row + offset).tolist()
        assert not layers.keys() & set(found)
        layers.update(dict.fromkeys(found, left.exit_layer))
        labels.update(zip(found, left.label.tolist(), strict=True))

    for exit_layer in stack.exit_layers[:at]:
        for loop, offset in zip(turns, (0, half), strict=True):
            if (left := next(loop, None)) is not None:
                assert left.exit_layer == exit_layer
                note(left, offset)
    if not layers.keys() >= set(range(half)):  # a loop that has ended takes nobody in
        rows[0].append(rows[1], half)
        remaining = turns[0]
        offset = 0
    else:
        remaining, offset = turns[1], half
    for left in remaining:
        note(left, offset)
    return layers, labels


@pytest.mark.parametrize("name", POLICIES)
@given(encodings=texts.filter(lambda some: len(some) > 1), seed=seeds, at=st.integers(0, 4))
def test_law_1_batches_joined_on_the_way_keep_their_answers(
    stack: PackedEncoder, run_loop: Any, name: str, encodings: list[Encoding], seed: int, at: int
) -> None:
    policy = make_policy(name)
    settings = random_settings(len(encodings), policy, 4, seed)
    together = run_loop(stack, encodings, policy, settings)
    layers, labels = joined_answers(stack, encodings, policy, settings, at)
    assert layers == dict(enumerate(together.exit_layer.tolist()))
    assert labels == dict(enumerate(together.label.tolist()))


@pytest.mark.parametrize("name", EARLY)
@given(encodings=texts, seed=seeds)
def test_law_2_rows_with_different_settings_share_a_batch(
    stack: PackedEncoder, run_loop: Any, name: str, encodings: list[Encoding], seed: int
) -> None:
    policy = make_policy(name)
    settings = random_settings(len(encodings), policy, 4, seed)
    together = run_loop(stack, encodings, policy, settings)
    for row, encoding in enumerate(encodings):
        alone = run_loop(stack, [encoding], policy, settings.at(np.array([row])))
        assert int(alone.exit_layer) == int(together.exit_layer[row])
        assert int(alone.label) == int(together.label[row])
        assert int(settings.min_layer[row]) <= int(alone.exit_layer) <= int(settings.max_layer[row])


@pytest.mark.parametrize("name", EARLY)
@given(encodings=texts, seed=seeds)
def test_law_3_a_higher_speedup_never_makes_a_row_leave_later(
    stack: PackedEncoder, run_loop: Any, name: str, encodings: list[Encoding], seed: int
) -> None:
    policy = make_policy(name)
    recorded = record_exits(stack, encodings)
    labels = torch.randint(3, (len(encodings),), generator=torch.Generator().manual_seed(seed))
    previous = torch.full((len(encodings),), 4)
    for point in curve(recorded, labels, policy):
        settings = RowSettings.uniform(len(encodings), point.threshold, max_layer=4)
        now = run_loop(stack, encodings, policy, settings).exit_layer
        assert (now <= previous).all()
        previous = now


@pytest.mark.parametrize("name", POLICIES)
@given(encodings=texts)
def test_law_3_never_early_is_the_plain_model(
    stack: PackedEncoder, run_loop: Any, name: str, encodings: list[Encoding]
) -> None:
    policy = make_policy(name)
    settings = RowSettings.uniform(len(encodings), never(policy), max_layer=4)
    answers = run_loop(stack, encodings, policy, settings)
    full = record_exits(stack, encodings).logits[-1]
    assert answers.exit_layer.eq(4).all()
    torch.testing.assert_close(answers.logits, full, rtol=1e-5, atol=1e-5)
    assert answers.label.equal(answers.logits.argmax(-1))


@pytest.mark.parametrize("name", POLICIES)
@given(
    logits=st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=4, max_size=4),
    broken=st.sets(st.integers(0, 3), min_size=1),
)
def test_law_3_a_nan_signal_never_leaves(
    name: str, logits: list[list[float]], broken: set[int]
) -> None:
    policy = make_policy(name)
    values, gate = torch.tensor(logits)[:, None], torch.rand(4, 1)
    for exit_index in broken:
        values[exit_index, :, exit_index % 3] = torch.nan
        if exit_index % 2:  # one of the two is enough
            gate[exit_index] = torch.nan
    outcome = replay(RecordedExits(values, (1, 2, 3, 4), gate), policy, -never(policy))
    if policy.name in ("full_depth", "fixed_layer"):  # they do not look at the signal
        return
    sound = [index + 1 for index in range(4) if index not in broken]
    assert int(outcome.exit_layer) == min([*sound, 4])


class _FailingStack(RecordedStack):
    def segment(self, exit_layer: int, hidden: PackedTokens) -> PackedTokens:
        if exit_layer == 3:
            raise RuntimeError("a layer failed")
        return super().segment(exit_layer, hidden)


@given(count=st.integers(1, 20), seed=seeds)
def test_law_4_each_row_is_answered_once_or_given_up(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    recorded = RecordedExits(torch.randn(4, count, 3, generator=generator), (1, 2, 3, 4))
    stack, policy = RecordedStack(recorded), make_policy("confidence")
    settings = RowSettings.uniform(count, 0.6, max_layer=4)
    gone = torch.rand(4, count, generator=generator) < 0.2  # by layer
    asked = iter(range(4))

    def abandoned(rows: torch.Tensor) -> torch.Tensor:
        return gone[next(asked), rows]

    answered: list[int] = []
    rows = start_rows(stack, stack.batch(), policy, settings)
    for leavers in layer_loop(stack, rows, policy, abandoned=abandoned):
        answered += leavers.row.tolist()
    plain = replay(recorded, policy, 0.6)
    expected = {row for row in range(count) if not gone[: int(plain.exit_layer[row]), row].any()}
    assert len(answered) == len(set(answered))
    assert set(answered) == expected


def test_law_4_rows_that_left_before_a_failure_keep_their_answers() -> None:
    recorded = RecordedExits(
        torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(0)) * 3, (1, 2, 3, 4)
    )
    stack, policy = _FailingStack(recorded), make_policy("confidence")
    answered: list[int] = []
    rows = start_rows(stack, stack.batch(), policy, RowSettings.uniform(30, 0.8, max_layer=4))
    loop = layer_loop(stack, rows, policy)
    with pytest.raises(RuntimeError, match="a layer failed"):
        answered.extend(row for leavers in loop for row in leavers.row.tolist())
    assert 0 < len(answered) == len(set(answered)) < 30


@pytest.mark.parametrize("name", POLICIES)
@given(encodings=texts, others=texts, seed=seeds)
def test_law_5_neighbours_and_order_do_not_change_an_answer(
    stack: PackedEncoder,
    run_loop: Any,
    name: str,
    encodings: list[Encoding],
    others: list[Encoding],
    seed: int,
) -> None:
    policy = make_policy(name)
    settings = random_settings(len(encodings) + len(others), policy, 4, seed)
    mixed = [*encodings, *others]
    order = list(range(len(mixed)))
    random.Random(seed).shuffle(order)
    plain = run_loop(stack, encodings, policy, settings.at(np.arange(len(encodings))))
    shuffled = run_loop(
        stack, [mixed[index] for index in order], policy, settings.at(np.array(order))
    )
    for place, index in enumerate(order):
        if index < len(encodings):
            assert int(shuffled.exit_layer[place]) == int(plain.exit_layer[index])
            assert int(shuffled.label[place]) == int(plain.label[index])


@pytest.mark.parametrize("name", POLICIES)
@given(seed=seeds, min_layer=st.integers(1, 4))
def test_the_vectorised_trace_is_the_layer_loop(name: str, seed: int, min_layer: int) -> None:
    policy = make_policy(name)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 25, 3, generator=generator) * 2
    recorded = RecordedExits(logits, (1, 2, 4, 6), torch.rand(4, 25, generator=generator))
    seen = trace(recorded, policy)
    labels = torch.zeros(25, dtype=torch.int64)
    for point in curve(recorded, labels, policy, num_points=20):
        outcome = replay(recorded, policy, point.threshold)
        exit_layer, label = seen.outcome(point.threshold)
        assert outcome.exit_layer.equal(exit_layer)
        assert outcome.label.equal(label)
        assert point.speedup == pytest.approx(6 * 25 / int(outcome.exit_layer.sum()))
        assert point.accuracy == pytest.approx(float((outcome.label == 0).double().mean()))


def test_exits_need_not_be_at_every_layer(run_loop: Any) -> None:
    ran: list[int] = []

    class TwoExits(RecordedStack):
        def segment(self, exit_layer: int, hidden: PackedTokens) -> PackedTokens:
            ran.append(exit_layer)
            return hidden

    recorded = RecordedExits(torch.zeros(2, 5, 3), (3, 6))
    stack = TwoExits(recorded)
    encodings = [Encoding([row], [0]) for row in range(5)]
    answers = run_loop(
        stack, encodings, make_policy("fixed_layer"), RowSettings.uniform(5, 4.0, max_layer=6)
    )
    assert ran == [3, 6]
    assert answers.exit_layer.eq(6).all()


def test_the_loop_stops_when_nobody_is_left(stack: PackedEncoder) -> None:
    policy = make_policy("fixed_layer")
    encodings = [Encoding([5, 6], [0, 0])] * 3
    settings = RowSettings.uniform(3, 2.0, max_layer=4)
    rows = start_rows(stack, TokenBatch.pack(encodings), policy, settings)
    passed = list(layer_loop(stack, rows, policy, compact=every_exit))
    assert [(leavers.exit_layer, len(leavers.row), leavers.rows_run) for leavers in passed] == [
        (1, 0, 3),
        (2, 3, 3),
    ]
    assert passed[1].by_policy.all()


def test_forced_rows_are_told_apart(stack: PackedEncoder) -> None:
    policy = make_policy("full_depth")
    encodings = [Encoding([5, 6], [0, 0])] * 2
    settings = RowSettings(np.zeros(2), np.array([1, 1]), np.array([2, 4]))
    rows = start_rows(stack, TokenBatch.pack(encodings), policy, settings)
    passed = list(layer_loop(stack, rows, policy))
    assert [leavers.row.tolist() for leavers in passed] == [[], [0], [], [1]]
    assert [leavers.rows_run for leavers in passed] == [2, 2, 1, 1]
    assert not any(leavers.by_policy.any() for leavers in passed)


def test_an_empty_head_output_is_an_empty_decision() -> None:
    rows = start_rows(
        RecordedStack(RecordedExits(torch.zeros(1, 1, 3), (1,))),
        TokenBatch.pack([Encoding([0], [0])]),
        make_policy("vote"),
        RowSettings.uniform(1, 1.0, max_layer=1),
    )
    rows.keep(torch.tensor([False]))
    decision = make_policy("vote").decide(1, HeadOutput(torch.zeros(0, 3)), rows)
    assert decision.leaving.shape == (0,)
    assert rows.hidden.num_rows == 0
