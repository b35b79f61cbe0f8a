"""What is computed next, and together: rules one by one, then invariants over whole simulations of
the very code that serves."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loading import load
from offramp_model.cost import GRID, StepTable
from offramp_service import job_queue
from offramp_service.job_queue import HORIZON_S
from offramp_service.jobs import Answer, Controls, Depth, Job, Left
from offramp_service.scheduler import (
    LEAST_SHARE,
    MOST_GROUPS,
    MOST_SHADOWS,
    SHADOW_TEXTS,
    SHADOW_TOKENS,
    Group,
    Plan,
    Scheduler,
    expected_seconds,
)

sim = load("service/bench/simulator.py")

LAYERS = 6
FLAT = StepTable((16, 1024, 2048, 4096), (1e-3, 1e-3, 2e-3, 4e-3))  # knee at 1024
LINEAR = StepTable((10, 1000), (1e-3, 0.1))  # 0.1 ms a token
FULL = Depth.full(LAYERS)
EARLY = Depth((1.0, 0.5, 0.25, 0.1, 0.05, 0.05))


class _Client:
    abandoned = False


def text(
    tokens: int = 32, depth: Depth = FULL, queued_at: float = 0.0, deadline: float | None = None
) -> Job:
    job = Job([0] * tokens, [0] * tokens, Controls(0.5, 1, LAYERS, depth))
    job.waiter, job.index = _Client(), 0
    job.queued_at, job.deadline = queued_at, deadline
    return job


def scheduler(costs: StepTable | None = None, **plan: object) -> Scheduler:
    base = Plan(max_batch_tokens=1000, max_batch_texts=100)
    return Scheduler(replace(base, **plan), costs)


def add(it: Scheduler, *jobs: Job) -> None:
    for job in jobs:
        it.add([job], job.queued_at)


def leave(group: Group, layer: int, *places: int) -> None:
    """The group ran to `layer`, and these left there."""
    answer = Answer(0, [], [], layer, 0.0, "criterion")
    group.passed(Left(layer, len(group.inside), [(place, answer) for place in places]))


# -- depth of a class ------------------------------------------------------------------------------


def test_depth_is_what_calibration_rows_did_within_the_bounds() -> None:
    counts = (50, 25, 15, 5, 0, 5)
    assert Depth.of(counts, 1, 6).inside == pytest.approx((1.0, 0.5, 0.25, 0.1, 0.05, 0.05))
    assert Depth.of(counts, 3, 6).inside == pytest.approx((1.0, 1.0, 1.0, 0.1, 0.05, 0.05))
    assert Depth.of(counts, 1, 2).inside == pytest.approx((1.0, 0.5))
    assert pytest.approx(1.95) == Depth.of(counts, 1, 6).mean
    assert EARLY.late == 4  # 5 % go deeper
    assert EARLY.ahead(1) == pytest.approx(0.95 / 0.5)
    assert Depth.of((9, 1, 0, 0), 1, 4).ahead(2) == 2.0  # no row went so deep: to the end
    assert Depth.full(4).ahead(4) == 0.0
    assert EARLY.share_going_on(1, 3) == pytest.approx(0.1 / 0.5)
    assert Depth.full(2).share_going_on(3, 3) == 0.0


@given(counts=st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), data=st.data())
def test_mean_depth_is_the_mean_exit_layer(counts: list[int], data: st.DataObject) -> None:
    low = data.draw(st.integers(1, 4))
    high = data.draw(st.integers(low, 4))
    layers = [layer for layer, count in enumerate(counts, 1) for _ in range(count)]
    expected = sum(min(max(layer, low), high) for layer in layers) / len(layers)
    assert Depth.of(counts, low, high).mean == pytest.approx(expected)


def test_a_batch_is_expected_to_shrink_as_its_classes_do() -> None:
    jobs = [text(100, EARLY) for _ in range(40)] + [text(100, Depth((1.0, 1.0)))]
    layers = [4100, 2100, 1000, 400, 200, 200]
    expected = sum(LINEAR(tokens) for tokens in layers)
    assert expected_seconds(jobs, LINEAR) == pytest.approx(expected)
    # On the way, of those that are left.
    left = sum(LINEAR(4000 * share / 0.25) for share in (0.25, 0.1, 0.05, 0.05))
    assert expected_seconds([text(100, EARLY) for _ in range(40)], LINEAR, 2) == pytest.approx(left)
    assert expected_seconds([], LINEAR) == 0.0
    # Half a text on average runs a layer half as often.
    assert expected_seconds([text(10, Depth((1.0, 0.5)))], FLAT) == pytest.approx(1.5e-3)


# -- one batch after the other ---------------------------------------------------------------------


def test_a_group_runs_to_its_end_before_the_next_is_opened() -> None:
    it = scheduler()
    assert it.next_step(0.0) is None
    first, second = text(), text()
    add(it, first)
    step = it.next_step(1.0)
    assert step is not None
    assert (step.group.jobs, step.opened, first.started_at) == ([first], "idle", 1.0)
    add(it, second)
    again = it.next_step(2.0)
    assert again is not None
    assert (again.group, again.opened, again.joined) == (step.group, None, None)
    leave(step.group, 6, 0)
    last = it.next_step(3.0)
    assert last is not None
    assert last.group is step.group  # comes to its end
    it.close(step.group)
    following = it.next_step(4.0)
    assert following is not None
    assert following.group.jobs == [second]


def test_a_batch_is_bounded_and_says_by_what() -> None:
    it = scheduler(max_batch_tokens=100)
    add(it, *(text(40) for _ in range(3)))
    step = it.next_step(0.0)
    assert step is not None
    assert (len(step.group.jobs), step.opened) == (2, "tokens")
    it = scheduler(max_batch_texts=2)
    add(it, *(text() for _ in range(3)))
    step = it.next_step(0.0)
    assert step is not None
    assert (len(step.group.jobs), step.opened) == (2, "full")


def test_a_batch_is_no_larger_than_its_deadlines_allow() -> None:
    it = scheduler(LINEAR)
    # Six layers of just over 20 ms: room for 200 tokens. Whoever is late even alone goes last.
    hopeless, pressing = text(100, deadline=0.01), text(50, deadline=0.121)
    others = [text(50) for _ in range(5)]
    add(it, hopeless, pressing, *others)
    step = it.next_step(0.0)
    assert step is not None
    assert (step.group.jobs, step.opened) == ([pressing, *others[:3]], "deadline")
    it.close(step.group)
    step = it.next_step(0.0)
    assert step is not None
    assert (step.group.jobs, step.opened) == ([*others[3:], hopeless], "idle")


def test_no_deadline_makes_a_batch_smaller_than_is_efficient() -> None:
    # Up to 64 tokens a layer costs the same: smaller batches would only make everybody late.
    costs = StepTable((16, 64, 1024), (1e-3, 1e-3, 16e-3))
    assert costs.efficient == 64
    it = scheduler(costs)
    pressing, others = text(16, deadline=6.1e-3), [text(16) for _ in range(9)]
    add(it, pressing, *others)
    step = it.next_step(0.0)
    assert step is not None
    assert (step.group.jobs, step.opened) == ([pressing, *others[:3]], "deadline")


def test_whom_nobody_waits_for_is_passed_over() -> None:
    it = scheduler()
    gone, stays = text(), text()
    add(it, gone, stays)
    gone.waiter = type("Gone", (), {"abandoned": True})()
    step = it.next_step(0.0)
    assert step is not None
    assert step.group.jobs == [stays]
    assert not it.queue
    # And a group that everybody has left comes to its end.
    stays.waiter = gone.waiter
    leave(step.group, 1)
    assert step.group.inside == {}
    last = it.next_step(0.0)
    assert last is not None
    assert last.group is step.group


def test_expected_time_counts_what_has_been_started() -> None:
    it = scheduler(LINEAR)
    assert it.seconds_until_answered([text(10, deadline=1.0)], 0.0) == pytest.approx(6e-3)
    add(it, text(100))
    it.next_step(5.0)  # 6 layers of 10 ms
    running = it.seconds_until_answered([text(10, deadline=9.0)], 5.02)
    assert running == pytest.approx(0.06 - 0.02 + 6e-3)
    assert scheduler().seconds_until_answered([text(10, deadline=9.0)], 0.0) == 0.0


def test_room_comes_when_that_share_of_the_work_is_done() -> None:
    it = scheduler(LINEAR)
    assert scheduler().seconds_until_room(0.0, texts=1) is None
    assert it.seconds_until_room(0.0, texts=1) == 0.0  # whoever fills the house is not here yet
    add(it, text(100))
    it.next_step(5.0)  # 6 layers of 10 ms
    assert it.seconds_until_room(5.02, texts=3) == pytest.approx(0.04)
    add(it, *(text(50, queued_at=5.0) for _ in range(4)))  # 6 layers of 5 ms each
    assert it.seconds_until_room(5.02, texts=1) == pytest.approx(0.04 + 0.03)
    assert it.seconds_until_room(5.02, tokens=100) == pytest.approx(0.04 + 0.06)
    assert it.seconds_until_room(5.02, texts=99) == pytest.approx(0.04 + 0.12)


# -- alike together --------------------------------------------------------------------------------


def test_alike_texts_are_put_together_but_nobody_is_made_late() -> None:
    it = scheduler(LINEAR, max_batch_tokens=120, group_alike=True)
    shallow = [text(30, EARLY) for _ in range(3)]
    deep = [text(30) for _ in range(3)]
    # Two batches take 2 · 4 layers · 12 ms: this one, with six to go in 73 ms, could not wait.
    pressing = text(30, deadline=0.073)
    add(it, deep[0], shallow[0], deep[1], shallow[1], pressing, shallow[2], deep[2])
    step = it.next_step(0.0)
    assert step is not None
    # It stands first, for it must start first; those that are like it follow.
    assert step.group.jobs == [pressing, deep[0], deep[1], deep[2]]
    it.close(step.group)
    step = it.next_step(0.0)
    assert step is not None
    assert step.group.jobs == shallow


def test_alike_or_not_the_hopeless_go_last() -> None:
    it = scheduler(LINEAR, max_batch_tokens=100, group_alike=True)
    first, good = text(50, queued_at=-0.95), [text(50) for _ in range(3)]
    hopeless = [text(50, deadline=0.001) for _ in range(2)]
    add(it, first, *hopeless, *good)
    batches = []
    while (step := it.next_step(0.0)) is not None:
        batches.append(step.group.jobs)
        it.close(step.group)
    assert batches == [[first, good[0]], good[1:], hopeless]


def test_a_look_ahead_of_departed_clients_hides_nobody() -> None:
    it = scheduler(LINEAR, max_batch_tokens=100, max_batch_texts=2, group_alike=True)
    gone, stays = [text(32) for _ in range(12)], text(32)
    add(it, *gone, stays)
    for job in gone:
        job.waiter = type("Gone", (), {"abandoned": True})()
    step = it.next_step(0.0)
    assert step is not None
    assert step.group.jobs == [stays]


def test_lengths_count_within_a_class() -> None:
    it = scheduler(LINEAR, max_batch_tokens=60, group_alike=True)
    jobs = [text(tokens) for tokens in (20, 50, 22, 48, 18)]
    add(it, *jobs)
    step = it.next_step(0.0)
    assert step is not None
    assert step.group.jobs == [jobs[0], jobs[2], jobs[4]]


# -- backlog mode ----------------------------------------------------------------------------------


def backlogged(**plan: object) -> Scheduler:
    """Ten times a batch of 256 tokens is waiting, and the knee is at 1024."""
    it = scheduler(FLAT, merge_backlog=True, max_batch_tokens=256, **plan)
    add(it, *(text(32) for _ in range(80)))
    return it


def test_merging_is_on_only_where_it_pays() -> None:
    assert backlogged().merges
    assert not scheduler(FLAT).merges
    assert not scheduler(LINEAR, merge_backlog=True).merges
    assert not scheduler(None, merge_backlog=True).merges
    it = backlogged()
    it.learn(FLAT, can_join=False)
    assert not it.merges
    assert it.why_not_merging == "a batch in the device lane runs to its end"


def test_who_has_come_as_far_goes_on_together() -> None:
    it = backlogged()
    groups: list[Group] = []
    while True:
        step = it.next_step(0.0)
        assert step is not None
        if step.joined is not None:
            break
        # Below the knee, and many more wait: the next batch comes as far, and meanwhile this waits.
        assert step.opened == "tokens"
        groups.append(step.group)
        leave(step.group, 1, 0, 1, 2, 3)
    assert len(groups) > 1
    assert {step.group, step.joined} <= set(groups)
    assert step.joined not in it.groups
    # Those of the joined group keep their places, counted on.
    assert sorted(step.group.inside) == [*range(4, 8), *range(12, 16)]
    assert [step.group.jobs[place] for place in range(12, 16)] == step.joined.jobs[4:]
    assert step.group.tokens == 8 * 32


def test_nobody_waits_who_has_no_time() -> None:
    it = backlogged()
    first = it.next_step(0.0)
    assert first is not None
    leave(first.group, 1)
    pressed = it.next_step(HORIZON_S - 5e-3)  # five layers of 1 ms are left, and as much time
    assert pressed is not None
    assert pressed.group is first.group


def two_groups(shallow: Job) -> tuple[Scheduler, Group, Group]:
    """One text after layer 1, and a group after layer 3 that fills the device; many wait."""
    it = scheduler(FLAT, merge_backlog=True, max_batch_tokens=2000)
    add(it, *(text(500) for _ in range(10)))
    young, deep = Group([shallow]), Group([text(500) for _ in range(3)])
    young.layer, deep.layer = 1, 3
    it.groups += [young, deep]
    return it, young, deep


def test_whoever_is_late_goes_before_the_deepest() -> None:
    it, young, deep = two_groups(text(32, queued_at=-2 * HORIZON_S))
    step = it.next_step(0.0)
    assert step is not None
    assert step.group is young
    it, young, deep = two_groups(text(32))
    step = it.next_step(0.0)
    assert step is not None
    assert step.group is deep


def test_no_group_is_skipped_for_ever() -> None:
    # 50 ms, of which five layers take 5: at most so many steps of 1 ms before it must go on.
    it, young, deep = two_groups(text(32, deadline=0.05))
    turns = 0
    while True:
        step = it.next_step(0.0)  # time stands still: nothing but its turns makes it urgent
        assert step is not None
        if step.group is young:
            break
        assert step.group is deep
        turns += 1
        assert turns < 50
    assert turns > 40


def test_the_work_ahead_is_what_the_groups_still_have_to_run() -> None:
    it = scheduler(FLAT, merge_backlog=True, max_batch_tokens=256)
    add(it, *(text(32) for _ in range(80)))
    asked = [text(32, deadline=1e9)]
    for _ in range(30):
        step = it.next_step(0.0)
        assert step is not None
        under_way = sum(LAYERS - group.layer for group in it.groups) * 1e-3
        budget = it.plan.max_batch_tokens
        queued, _ = it.queue.work_before(1e9, asked, FLAT, budget)
        assert it.seconds_until_answered(asked, 0.0) == pytest.approx(under_way + queued)
        leave(step.group, step.group.layer + 1, *list(step.group.inside)[:1])
        if step.group.layer == LAYERS:
            it.close(step.group)


def test_the_mode_ends_with_the_backlog_and_groups_are_few() -> None:
    it = backlogged()
    for _ in range(40):
        step = it.next_step(0.0)
        assert step is not None
        assert len(it.groups) <= MOST_GROUPS
        leave(step.group, step.group.layer + 1)
        if step.group.layer == LAYERS:
            step.group.inside.clear()
            it.close(step.group)
    while len(it.queue) > 4:
        it.queue.take_out(it.queue[0][2])
    while it.groups:
        step = it.next_step(0.0)
        assert step is not None
        assert step.opened is None  # what is under way is finished first
        assert step.group.layer == max([one.layer for one in it.groups], default=step.group.layer)
        leave(step.group, LAYERS, *step.group.inside)
        it.close(step.group)


def test_a_queue_of_departed_clients_is_no_reason_to_wait() -> None:
    it = backlogged()
    for job in it.queue:
        job.waiter = type("Gone", (), {"abandoned": True})()
    assert it.next_step(0.0) is None
    assert not it.queue


# -- shadow texts ----------------------------------------------------------------------------------


def test_a_shadow_batch_is_small_and_stands_aside_at_every_exit() -> None:
    it = scheduler(FLAT)
    for _ in range(SHADOW_TEXTS + 1):
        assert it.add_shadow(text(16))
    step = it.next_step(0.0)
    assert step is not None
    assert step.group.shadow
    assert len(step.group.jobs) == SHADOW_TEXTS
    assert not it.groups
    # A client's text that comes now waits for this stretch of 1 ms, and for nothing else.
    assert it.seconds_until_answered([text(16)], 0.0) == pytest.approx(1e-3 + 6e-3)
    leave(step.group, 1)
    client = text(16)
    add(it, client)
    theirs = it.next_step(0.001)
    assert theirs is not None
    assert (theirs.group.jobs, theirs.group.shadow, theirs.joined) == ([client], False, None)
    leave(theirs.group, 1)  # at the same exit as the shadow batch, and yet not joined by it
    assert it.seconds_until_answered([text(16)], 0.001) == pytest.approx(6e-3 + 6e-3)
    going_on = it.next_step(0.002)
    assert going_on is not None
    assert going_on.group is theirs.group
    leave(theirs.group, LAYERS, 0)
    it.close(theirs.group)
    resumed = it.next_step(0.007)
    assert resumed is not None
    assert (resumed.group, resumed.opened) == (step.group, None)
    it.close(step.group)
    rest = it.next_step(0.008)
    assert rest is not None
    assert len(rest.group.jobs) == 1


def test_a_shadow_batch_is_small_in_tokens_too() -> None:
    it = scheduler()
    sizes = (SHADOW_TOKENS + 100, SHADOW_TOKENS // 2, SHADOW_TOKENS // 2, 1)
    for size in sizes:
        it.add_shadow(text(size))
    batches = []
    while (step := it.next_step(0.0)) is not None:
        batches.append([job.tokens for job in step.group.jobs])
        it.close(step.group)
    assert batches == [[sizes[0]], [*sizes[1:3]], [1]]


def test_where_batches_cannot_stand_aside_a_shadow_batch_ends_first() -> None:
    it = scheduler(FLAT)
    it.learn(FLAT, can_join=False)
    it.add_shadow(text(16))
    step = it.next_step(0.0)
    assert step is not None
    assert it.seconds_until_answered([text(16)], 0.0) == pytest.approx(6e-3 + 6e-3)
    leave(step.group, 1)
    add(it, text(16))
    going_on = it.next_step(0.001)
    assert going_on is not None
    assert going_on.group is step.group


def test_shadow_texts_are_few_and_nobody_listens_to_those_of_a_closed_service() -> None:
    it = scheduler()
    kept = [it.add_shadow(text()) for _ in range(MOST_SHADOWS + 5)]
    assert kept == [True] * MOST_SHADOWS + [False] * 5
    assert (len(it.queue), it.queue.tokens, it.queue.layers) == (0, 0, 0.0)
    for job in it.shadows:
        job.waiter = type("Gone", (), {"abandoned": True})()
    assert it.next_step(0.0) is None
    assert not it.shadows


# -- several workers -------------------------------------------------------------------------------


def test_workers_share_what_waits() -> None:
    it = scheduler(workers=2)
    add(it, *(text(32) for _ in range(20)))
    first, second = it.next_step(0.0, 0), it.next_step(0.0, 1)
    assert first is not None
    assert second is not None
    assert [len(step.group.jobs) for step in (first, second)] == [10, 10]
    assert (first.opened, second.opened) == ("share", "idle")
    # Half of all there is, whoever has it: what one has much of, it gets less of.
    leave(second.group, 1, *range(8))
    add(it, *(text(32) for _ in range(8)))
    leave(second.group, 2, 8, 9)
    ends = it.next_step(0.0, 1)
    assert ends is not None
    it.close(ends.group)
    third = it.next_step(0.0, 1)
    assert third is not None
    assert len(third.group.jobs) == 8  # (10 + 8) / 2 would be 9


def test_a_few_texts_are_not_torn_apart() -> None:
    it = scheduler(workers=2)
    add(it, *(text(LEAST_SHARE // 4) for _ in range(4)))
    step = it.next_step(0.0, 0)
    assert step is not None
    assert len(step.group.jobs) == 4
    assert it.next_step(0.0, 1) is None


def test_a_worker_goes_on_with_its_own_batch() -> None:
    it = scheduler(FLAT, workers=2, merge_backlog=True)
    add(it, *(text(100) for _ in range(40)))
    opened = [it.next_step(0.0, worker) for worker in (0, 1)]
    for step in opened:
        assert step is not None
        leave(step.group, 1)
    # At the same exit, with a backlog, and yet nobody joins or waits.
    assert "side by side" in (it.why_not_merging or "")
    for worker in (1, 0, 0, 1):
        step, mine = it.next_step(0.0, worker), opened[worker]
        assert step is not None
        assert mine is not None
        assert (step.group, step.opened, step.joined) == (mine.group, None, None)


def test_with_several_workers_a_text_waits_for_the_first_that_is_free() -> None:
    it = scheduler(LINEAR, workers=2)
    alone = 6 * LINEAR(100)
    assert it.seconds_until_answered([text(100)], 0.0) == pytest.approx(alone)
    add(it, text(400))
    it.next_step(0.0, 0)
    assert it.seconds_until_answered([text(100)], 0.0) == pytest.approx(alone)  # the other is idle
    add(it, text(200))
    it.next_step(0.0, 1)
    assert it.seconds_until_answered([text(100)], 0.0) == pytest.approx(6 * LINEAR(200) + alone)
    # Those that wait are computed by two, when the second is free as well.
    begun = 6 * (LINEAR(200) + LINEAR(400))
    add(it, text(100))
    longer = 6 * LINEAR(200) + 6 * LINEAR(200)
    assert it.seconds_until_answered([text(100)], 0.0) == pytest.approx(longer)
    add(it, *(text(100) for _ in range(3)))
    both = (begun + 6 * LINEAR(500)) / 2
    assert it.seconds_until_answered([text(100)], 0.0) == pytest.approx(both)
    assert it.seconds_until_room(0.0, texts=4) == pytest.approx((begun + 6 * LINEAR(400)) / 2)


def test_what_is_not_torn_apart_is_not_expected_to_be() -> None:
    it = scheduler(LINEAR, workers=2)
    assert LEAST_SHARE >= 120
    few = [text(30) for _ in range(4)]
    assert it.seconds_until_answered(few, 0.0) == pytest.approx(6 * LINEAR(120))


def test_a_client_need_not_wait_for_a_shadow_batch_where_another_worker_is_idle() -> None:
    it = scheduler(FLAT, workers=2)
    it.add_shadow(text(16))
    shadow = it.next_step(0.0, 0)
    assert shadow is not None
    assert it.seconds_until_answered([text(16)], 0.0) == pytest.approx(6e-3)
    # The other worker gets a client's text: the first to be free is the one with the shadow batch.
    add(it, text(16))
    it.next_step(0.0, 1)
    assert it.seconds_until_answered([text(16)], 0.0) == pytest.approx(1e-3 + 6e-3)


def test_a_shadow_batch_is_run_by_whoever_is_done_last() -> None:
    it = scheduler(workers=2)
    it.add_shadow(text(16))
    shadow = it.next_step(0.0, 1)
    assert shadow is not None
    assert shadow.group.shadow
    assert it.next_step(0.0, 0) is None  # the other has it in hands
    leave(shadow.group, 1)
    add(it, text(16))
    theirs = it.next_step(0.0, 0)
    assert theirs is not None
    assert not theirs.group.shadow
    assert it.next_step(0.0, 1) is None  # stands aside while a client's text is under way
    leave(theirs.group, LAYERS, 0)
    assert it.next_step(0.0, 1) is None
    it.close(theirs.group)
    resumed = it.next_step(0.0, 0)
    assert resumed is not None
    assert resumed.group is shadow.group
    assert it.next_step(0.0, 1) is None


def test_what_a_worker_had_in_hands_is_let_go_and_nothing_else() -> None:
    it = scheduler(workers=2)
    add(it, *(text(LEAST_SHARE) for _ in range(3)))
    steps = [it.next_step(0.0, worker) for worker in (0, 1)]
    assert it.let_go(0) == 0
    assert [group.worker for group in it.groups] == [1]
    assert len(it.queue) == 1
    again = it.next_step(0.0, 1)
    assert again is not None
    assert steps[1] is not None
    assert again.group is steps[1].group
    assert it.next_step(0.0, 0) is not None


@given(
    st.integers(2, 4),
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, LAYERS)), max_size=40),
    st.randoms(use_true_random=False),
)
def test_with_several_workers_every_text_ends_once_and_none_is_idle_while_one_waits(
    workers: int, sizes: list[tuple[int, int]], rng: random.Random
) -> None:
    it = scheduler(workers=workers)
    coming = [text(tokens) for tokens, _ in sizes]
    ends_at = {job: layer for job, (_, layer) in zip(coming, sizes, strict=True)}
    computing: dict[int, Group] = {}
    left: list[Job] = []
    while coming or it.queue or it.groups:
        while coming and rng.random() < 0.4:
            add(it, coming.pop())
        worker = rng.randrange(workers)
        if (group := computing.pop(worker, None)) is not None:
            if not group.inside:
                it.close(group)
            else:
                layer = group.layer + 1
                out = [place for place, job in group.inside.items() if ends_at[job] <= layer]
                left += [group.jobs[place] for place in out]
                leave(group, layer, *out)
        if (step := it.next_step(0.0, worker)) is not None:
            assert all(step.group is not other for other in computing.values())
            assert step.joined is None
            computing[worker] = step.group
        else:
            assert not it.queue
    assert sorted(map(id, left)) == sorted(map(id, ends_at))


# -- whole runs ------------------------------------------------------------------------------------

TABLES = {
    "flat": StepTable((16, 512, 1024, 4096), (1e-3, 1e-3, 2e-3, 8e-3)),
    "steps": StepTable((16, 256, 300, 512, 600, 4096), (1e-3, 1e-3, 2e-3, 2e-3, 3e-3, 20e-3)),
    "linear": StepTable((16, 4096), (16e-5, 4096e-5)),
}
PLANS = st.builds(
    Plan,
    max_batch_tokens=st.sampled_from([64, 256, 1024]),
    max_batch_texts=st.sampled_from([2, 16, 64]),
    workers=st.sampled_from([1, 1, 2, 3]),
    group_alike=st.booleans(),
    merge_backlog=st.booleans(),
)
WORLDS = st.fixed_dictionaries(
    {
        "plan": PLANS,
        "table": st.sampled_from(sorted(TABLES)),
        "exits": st.sampled_from([(1, 2, 3, 4, 5, 6), (2, 4, 6), (6,)]),
        "load": st.sampled_from([0.2, 0.9, 3.0, 50.0]),
        "seed": st.integers(0, 2**32),
        "deadlines": st.booleans(),
    }
)
MOST_TOKENS = 64


def simulate(world: dict, count: int = 120, **how: float) -> tuple:
    costs, exits, plan = TABLES[world["table"]], world["exits"], world["plan"]
    device = sim.Device(costs, exits, move_s=1e-5, move_token_s=1e-8)
    full = min(plan.max_batch_tokens / 30, plan.max_batch_texts)
    rate = (
        plan.workers * world["load"] * full / (4 * costs(full * 30))
    )  # of what full batches could do, roughly
    traffic = sim.poisson(
        random.Random(world["seed"]),
        rate,
        count,
        classes=[(0.3, FULL), (0.5, EARLY), (0.2, Depth((1.0, 0.5)))],
        tokens=[3, 20, 40, MOST_TOKENS],
        deadline_s=0.05 if world["deadlines"] else None,
        with_deadline=0.7,
    )
    return traffic, sim.Simulation(replace(plan), device, traffic, **how).run()


def exit_of(text: object, exits: tuple[int, ...]) -> int:
    return next(one for one in exits if one >= text.exit_layer)


@given(WORLDS)
@settings(max_examples=150, deadline=None)
def test_every_text_ends_once_and_where_it_would_alone(world: dict) -> None:
    """Whatever comes beside it, whoever is joined with whom."""
    traffic, outcome = simulate(world)
    ends = [*outcome.answered, *outcome.refused, *outcome.given_up]
    assert sorted(ends) == list(range(len(traffic)))
    for number, layer in outcome.exit_layers.items():
        assert layer == exit_of(traffic[number], world["exits"])
    for number, took in outcome.answered.items():
        assert took <= (traffic[number].deadline_s or float("inf"))
    if not world["deadlines"]:
        assert len(outcome.answered) == len(traffic)
    assert all(traffic[number].deadline_s is not None for number in outcome.refused)


@given(WORLDS)
@settings(max_examples=100, deadline=None)
def test_work_is_conserved(world: dict) -> None:
    """Layers run are the depths of those who came out, and no more than all of it for the rest."""
    _, outcome = simulate(world)
    came_out = sum(outcome.exit_layers.values())
    started = set(outcome.starts) - outcome.exit_layers.keys()
    assert len(outcome.starts) == len(set(outcome.starts)), "a text was started twice"
    assert came_out <= outcome.text_layers <= came_out + LAYERS * len(started)
    if not world["deadlines"]:
        assert outcome.text_layers == came_out
        assert not started


@given(WORLDS)
@settings(max_examples=100, deadline=None)
def test_first_come_first_served_among_equals(world: dict) -> None:
    """Without grouping, texts of one size and class start in the order in which they came. With
    deadlines whoever is too late is passed over, so this is of those without."""
    world["plan"] = replace(world["plan"], group_alike=False)
    traffic, outcome = simulate(world)
    order = {number: place for place, number in enumerate(outcome.starts)}
    classes: dict[tuple, list[int]] = {}
    for number, one in enumerate(traffic):
        key = (one.tokens, one.depth)
        if number in order and one.deadline_s is None:
            classes.setdefault(key, []).append(order[number])
    assert all(places == sorted(places) for places in classes.values())


@given(WORLDS)
@settings(max_examples=100, deadline=None)
def test_no_group_waits_longer_than_its_window(world: dict) -> None:
    """A group waits at an exit only while its most pressing text has the time, or while others are
    more pressing still: those are at most the other groups, each with its rest to run."""
    world["deadlines"] = False
    world["plan"] = replace(world["plan"], merge_backlog=True)
    _, outcome = simulate(world)
    budget = max(world["plan"].max_batch_tokens, MOST_TOKENS)
    one_batch = LAYERS * TABLES[world["table"]](2 * budget)
    assert outcome.longest_pause_s <= HORIZON_S + MOST_GROUPS * one_batch


@given(WORLDS)
@settings(max_examples=50, deadline=None)
def test_where_cost_is_linear_the_mode_is_never_entered(world: dict) -> None:
    world["table"] = "linear"
    plain, merged = (
        simulate(world | {"plan": replace(world["plan"], merge_backlog=on)})[1]
        for on in (False, True)
    )
    assert merged == plain


@given(WORLDS)
@settings(max_examples=100, deadline=None)
def test_shadow_texts_run_in_the_gaps_and_cost_clients_a_stretch_at_most(world: dict) -> None:
    """The simulator itself insists that nobody waits while one runs; here, that clients get what
    they got, and how long the engine is not free for them."""
    traffic, outcome = simulate(world, shadow_rate=1.0)
    left_early = [one for one in outcome.exit_layers.values() if one < LAYERS]
    assert outcome.shadows_compared + outcome.shadows_dropped == len(left_early)
    assert outcome.shadow_layers == LAYERS * outcome.shadows_compared
    exits = (0, *world["exits"])
    stretch = max(after - before for before, after in pairwise(exits))
    most = stretch * TABLES[world["table"]](max(SHADOW_TOKENS, MOST_TOKENS))
    assert outcome.longest_shadow_s <= most + 1e-9
    for number, layer in outcome.exit_layers.items():
        assert layer == exit_of(traffic[number], world["exits"])
    if not world["deadlines"]:
        assert len(outcome.answered) == len(traffic)
        assert outcome.text_layers == sum(outcome.exit_layers.values())


def test_single_texts_need_not_wait_for_a_large_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of eight texts, three quarters of what the device can do, 40 % of it in requests of
    32. With and without letting small requests pass; a request's time is that of its last text."""
    costs, rng = TABLES["linear"], random.Random(0)
    device = sim.Device(costs, tuple(range(1, LAYERS + 1)))
    each_s, share = LAYERS * costs(32), 0.02
    traffic, now = [], 0.0
    for number in range(4000):
        now += rng.expovariate(0.75 / each_s / (32 * share + 1 - share))
        count = 32 if rng.random() < share else 1
        traffic += [sim.Text(now, 32, FULL, LAYERS, request=number)] * count
    sizes = Counter(one.request for one in traffic)

    def mean_times() -> tuple[float, float]:
        outcome = sim.Simulation(Plan(256, 8), device, traffic).run()
        last: dict[int, float] = {}
        for number, one in enumerate(traffic):
            last[one.request] = max(last.get(one.request, 0.0), outcome.answered[number])
        singles, large = (
            [took for request, took in last.items() if (sizes[request] > 1) == is_large]
            for is_large in (False, True)
        )
        return sum(singles) / len(singles), sum(large) / len(large)

    singles, large = mean_times()
    monkeypatch.setattr(job_queue, "FURTHER_TEXT_S", 0.0)
    singles_before, large_before = mean_times()
    assert singles < 0.9 * singles_before
    assert large < 1.2 * large_before


def test_merging_pays_where_batches_are_small_and_layers_flat() -> None:
    """Batches of 32 texts on a device that is as fast for 16; a tenth more is to be had."""
    costs = StepTable(GRID, tuple(max(17e-6, 29.9e-9 * tokens) for tokens in GRID))
    device = sim.Device(costs, tuple(range(1, 13)), move_s=5e-6, move_token_s=1.5e-9)
    shares = [(1 / 3, Depth(tuple(q**k for k in range(12)))) for q in (1.0, 0.83, 0.69)]
    traffic = sim.poisson(random.Random(0), 400e3, 6000, classes=shares, tokens=[32])
    plain, merged = (
        sim.Simulation(Plan(1024, 32, merge_backlog=on), device, traffic).run()
        for on in (False, True)
    )
    assert merged.ends < 0.93 * plain.ends
    assert merged.joined > 10
