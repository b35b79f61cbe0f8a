"""The engine against a stack whose every exit's logits are written down by the test."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loading import load
from offramp_model.layer_loop import layer_loop, start_rows
from offramp_model.noted import NotedPolicy
from offramp_model.policies import HeadOutput, make_policy
from offramp_model.rows import Encoding, PackedTokens, RowSettings, TokenBatch
from offramp_service.engine import Engine
from offramp_service.jobs import Controls, Depth, Job

lane_cases: Any = load("tests/unit/model/lane_cases.py")


class ScriptedStack:
    """Two classes, four layers. A text of token `n` is sure from layer n on; 9 is broken."""

    num_layers, num_labels, exit_layers = 4, 2, (1, 2, 3, 4)
    problem_type = "single_label_classification"

    def embed(self, batch: TokenBatch) -> PackedTokens:
        return PackedTokens(batch.input_ids[:, None].astype(np.float32), batch.cu_seqlens)

    def segment(self, exit_layer: int, hidden: PackedTokens) -> PackedTokens:
        return hidden

    def exit_head(self, exit_layer: int, hidden: PackedTokens) -> HeadOutput:
        token = hidden.values[hidden.cu_seqlens[:-1], 0]
        sure = np.where(token <= exit_layer, np.float32(4.0), np.float32(0.1))
        sure = np.where(token == 9, np.nan, sure)
        return HeadOutput(np.stack([-sure, sure], axis=-1))


class Client:
    def __init__(self, abandoned: bool = False) -> None:
        self.abandoned = abandoned


def text(
    token: int,
    length: int = 2,
    *,
    threshold: float = 0.9,
    min_layer: int = 1,
    max_layer: int = 4,
    abandoned: bool = False,
    all_signals: bool = False,
) -> Job:
    controls = Controls(threshold, min_layer, max_layer, Depth.full(4), all_signals=all_signals)
    job = Job([token] * length, [0] * length, controls)
    job.waiter = Client(abandoned)
    return job


@pytest.fixture
def engine() -> Engine:
    engine = Engine(ScriptedStack(), make_policy("confidence"))
    engine.warm_up(8)
    return engine


def run(engine: Engine, jobs: list[Job]) -> dict:
    return {index: answer for left in engine(jobs) for index, answer in left.answers}


def test_each_text_leaves_where_it_is_sure(engine: Engine) -> None:
    answers = run(engine, [text(3, 5), text(1, 2), text(4, 7), text(2, 1)])
    assert [answers[index].exit_layer for index in range(4)] == [3, 1, 4, 2]
    assert [answers[index].reason for index in range(4)] == [
        *("criterion", "criterion", "final", "criterion")
    ]
    assert answers[1].label == 1
    assert sum(answers[1].probs) == pytest.approx(1.0)
    assert answers[1].signal == pytest.approx(answers[1].probs[1])
    assert answers[1].logits == [-4.0, 4.0]


def test_settings_are_mixed_freely_in_one_batch(engine: Engine) -> None:
    jobs = [
        text(1, threshold=float("inf")),
        text(1, min_layer=3),
        text(4, max_layer=2),
        text(4, threshold=0.5),
        text(1),
    ]
    answers = run(engine, jobs)
    assert [answers[index].exit_layer for index in range(5)] == [4, 3, 2, 1, 1]
    assert [answers[index].reason for index in range(5)] == [
        *("final", "criterion", "forced", "criterion", "criterion")
    ]


def test_answers_come_exit_by_exit(engine: Engine) -> None:
    parts = [
        (left.exit_layer, left.texts_run, [index for index, _ in left.answers])
        for left in engine([text(4), text(1), text(1)])
    ]
    assert parts == [(1, 3, [1, 2]), (2, 1, []), (3, 1, []), (4, 1, [0])]


def test_scores_that_are_not_numbers_fail_their_text_only(engine: Engine) -> None:
    answers = run(engine, [text(9), text(1)])
    assert isinstance(answers[0], ArithmeticError)
    assert answers[1].exit_layer == 1


def test_abandoned_texts_are_dropped(engine: Engine) -> None:
    assert run(engine, [text(2, abandoned=True), text(3)]).keys() == {1}
    assert run(engine, [text(2, abandoned=True)]) == {}


def test_a_text_abandoned_on_the_way_is_dropped_at_the_next_exit(engine: Engine) -> None:
    jobs = [text(1), text(4)]
    parts = iter(engine(jobs))
    assert [index for index, _ in next(parts).answers] == [0]
    jobs[1].waiter = Client(abandoned=True)
    assert list(parts) == []


def test_broken_and_abandoned_texts_ran_their_layers_too(engine: Engine) -> None:
    jobs = [text(9), text(4), text(1)]
    ran = []
    for left in engine(jobs):
        ran.append((left.exit_layer, left.texts_run))
        if left.exit_layer == 2:
            jobs[1].waiter = Client(abandoned=True)
    assert ran == [(1, 3), (2, 2), (3, 1), (4, 1)]


def test_batches_go_on_together_and_their_places_count_on(engine: Engine) -> None:
    older, younger = [text(2, 3), text(4, 1), text(1, 2)], [text(1, 4), text(3, 2), text(4, 3)]
    first, second = engine(older), engine(younger)
    assert [index for index, _ in next(first).answers] == [2]
    assert [index for index, _ in next(second).answers] == [0]
    first.take_in(second)
    parts = [(left.exit_layer, left.texts_run, dict(left.answers)) for left in first]
    assert [(layer, run) for layer, run, _ in parts] == [(2, 4), (3, 3), (4, 2)]
    assert [sorted(answers) for _, _, answers in parts] == [[0], [4], [1, 5]]
    for layer, _, answers in parts:
        assert all(answer.exit_layer == layer for answer in answers.values())


def test_who_gave_up_before_joining_is_dropped_after_it(engine: Engine) -> None:
    older, younger = [text(4)], [text(4), text(3)]
    first, second = engine(older), engine(younger)
    next(first)
    next(second)
    first.take_in(second)
    younger[0].waiter = Client(abandoned=True)
    assert [sorted(dict(left.answers)) for left in first] == [[], [2], [0]]


def test_who_asks_gets_the_signals_of_all_exits(engine: Engine) -> None:
    jobs = [text(3, 5, all_signals=True), text(1, 2), text(1, all_signals=True), text(9)]
    answers = run(engine, jobs)
    sure, unsure = answers[2].signal, answers[0].signals[0][1]
    assert sure > 0.9 > unsure
    assert answers[0].signals == [(1, unsure), (2, unsure), (3, sure)]
    assert answers[2].signals == [(1, sure)]
    assert answers[1].signals is None


def test_batches_that_join_keep_their_signals(engine: Engine) -> None:
    first, second = engine([text(4)]), engine([text(1), text(3, all_signals=True)])
    next(first)
    next(second)
    first.take_in(second)
    answers = {index: answer for left in first for index, answer in left.answers}
    assert answers[0].signals is None
    assert [layer for layer, _ in answers[2].signals] == [1, 2, 3]
    assert answers[2].signals[-1] == (3, answers[2].signal)


def test_whose_answer_is_latched_has_seen_all_signals() -> None:
    """Compaction never, so that a row which has left is still carried."""
    stack, policy = ScriptedStack(), NotedPolicy(make_policy("confidence"), [0, 1])
    batch = TokenBatch.pack([Encoding([1], [0]), Encoding([3], [0])])
    rows = start_rows(stack, batch, policy, RowSettings.uniform(2, 0.9, max_layer=4))
    left = list(layer_loop(stack, rows, policy, compact=lambda *_: False))
    assert [one.row.tolist() for one in left] == [[0], [], [1]]
    assert [layer for layer, _ in policy.signals[0]] == [1]
    assert [layer for layer, _ in policy.signals[1]] == [1, 2, 3]


def test_a_text_that_does_not_come_out_is_noticed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp_service.engine.layer_loop", lambda *_, **__: iter(()))
    with pytest.raises(RuntimeError, match="2 texts went in, 2 did not come out"):
        list(engine([text(1), text(2)]))


def test_whole_batches_on_the_device_answer_as_the_loop_does() -> None:
    """With the kernels' twins; texts that are too long for the lane go through the loop."""
    stack = lane_cases.make_stack(max_length=40)
    looped, laned = (Engine(stack, make_policy("entropy")) for _ in range(2))
    costs = laned.open_lane(max_tokens=64, max_rows=8, survival=[0.5, 0.2, 0.0])
    assert costs(32) > 0
    batches = [
        [text(5 + place, length, threshold=0.9) for place, length in enumerate(lengths)]
        for lengths in ((3, 9, 1, 9), (2,), (30, 30, 30))  # the last fits no bucket
    ]
    for jobs in batches:
        for job in jobs:
            job.controls = replace(job.controls, max_layer=3)
        expected, found = run(looped, jobs), run(laned, jobs)
        assert found.keys() == expected.keys()
        for index, answer in found.items():
            ours = answer.exit_layer, answer.label, answer.reason
            assert ours == (
                *(expected[index].exit_layer, expected[index].label, expected[index].reason),
            )
            assert answer.logits == pytest.approx(expected[index].logits, abs=1e-4)
    asking = [text(5, 3, threshold=0.02, all_signals=True), text(6, 9, threshold=0.9)]
    expected, found = run(looped, asking), run(laned, asking)
    assert found[1].signals is None
    # Through the loop as well, so nothing is left to tolerance.
    assert found[0].signals == expected[0].signals
    assert [layer for layer, _ in found[0].signals] == [*range(1, found[0].exit_layer + 1)]
    with pytest.raises(RuntimeError, match="cannot be joined"):
        laned(batches[0]).take_in(laned(batches[1]))
    batches[0][1].waiter = Client(abandoned=True)
    assert run(laned, batches[0]).keys() == {0, 2, 3}


def test_a_lane_runs_encoders_in_torch(engine: Engine) -> None:
    with pytest.raises(ValueError, match="in torch"):
        engine.open_lane(max_tokens=64, max_rows=8, survival=[])
