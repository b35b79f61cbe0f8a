"""Who is next: by latest start, then by arrival; and what stands before whom."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_model.cost import StepTable
from offramp_service.job_queue import (
    FURTHER_TEXT_S,
    HORIZON_S,
    MOST_YIELDING_S,
    PRIORITY_S,
    JobQueue,
    latest_start,
    place_of,
)
from offramp_service.jobs import LEAST_PRIORITY, MOST_PRIORITY, Controls, Depth, Job

TABLE = StepTable((10, 1000), (0.001, 0.1))  # 0.1 ms a token


def job(tokens: int = 3, layers: int = 4, deadline: float | None = None, priority: int = 0) -> Job:
    controls = Controls(0.5, 1, 4, Depth.full(layers), priority=priority)
    one = Job([0] * tokens, [0] * tokens, controls)
    one.deadline = deadline
    return one


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 4), st.booleans()), min_size=1, max_size=40
    )
)
def test_the_order_is_that_of_a_stable_sort_whoever_leaves(
    requests: Sequence[tuple[int, int, bool]],
) -> None:
    queue = JobQueue()
    expected: list[tuple[float, Job]] = []
    for start, count, leaves in requests:
        jobs = [job(tokens=1 + place) for place in range(count)]
        queue.add(jobs, float(start))
        if leaves:
            queue.take_out(jobs.pop())
        expected += [(float(start), one) for one in jobs]
    expected.sort(key=lambda pair: pair[0])
    assert list(queue) == [one for _, one in expected]
    for left in range(len(expected), 0, -1):
        assert len(queue) == left
        waiting = [one for _, one in expected[-left:]]
        assert queue.tokens == sum(one.tokens for one in waiting)
        assert queue.layers == pytest.approx(4.0 * left)
        first = queue[0][2]
        assert first is waiting[0]
        assert first in queue
        queue.take_out(first)
        assert first not in queue
    assert (len(queue), queue.tokens, queue.layers) == (0, 0, 0.0)
    with pytest.raises(KeyError):
        queue.take_out(job())


def test_a_text_starts_early_enough_for_its_layers() -> None:
    assert latest_start(job(), 5.0, TABLE) == 5.0 + HORIZON_S
    assert latest_start(job(deadline=5.5), 5.0, None) == 5.5
    # 20 tokens at 2 ms a layer, 4 layers.
    text = job(tokens=20, deadline=5.5)
    assert latest_start(text, 5.0, TABLE) == pytest.approx(5.5 - 4 * 0.002)


def test_what_stands_before_is_computed_in_full_batches() -> None:
    queue = JobQueue()
    queue.add([job(tokens=100, layers=2)], 1.0)
    queue.add([job(tokens=100, layers=4)], 3.0)  # behind whoever starts by 2
    mine = [job(tokens=50, layers=4)]
    needed, tokens = queue.work_before(2.0, mine, TABLE, budget=1000)
    assert needed == pytest.approx((100 * 2 + 50 * 4) * TABLE(150) / 150)
    assert tokens == 150
    # A table with a fixed price: small batches are dear by the token.
    steps = StepTable((10, 1000), (0.1, 0.1))
    assert queue.work_before(2.0, mine, steps, 1000)[0] == pytest.approx(400 * 0.1 / 150)
    assert queue.work_before(2.0, mine, steps, budget=50)[0] == pytest.approx(400 * 0.1 / 50)
    assert queue.work_before(0.0, [], TABLE, 1000) == (0.0, 0)
    assert queue.seconds_for_all(TABLE, 1000) == pytest.approx(600 * TABLE(200) / 200)
    assert JobQueue().seconds_for_all(TABLE, 1000) == 0.0


def test_many_texts_let_smaller_requests_pass_but_keep_their_deadline() -> None:
    assert place_of([job()], 5.0, None) == 5.0 + HORIZON_S
    batch = [job() for _ in range(32)]
    assert place_of(batch, 5.0, None) == pytest.approx(5.0 + HORIZON_S + 31 * FURTHER_TEXT_S)
    huge = [job() for _ in range(5000)]
    assert place_of(huge, 5.0, None) == 5.0 + HORIZON_S + MOST_YIELDING_S
    assert place_of([job(deadline=5.5) for _ in range(32)], 5.0, None) == 5.5
    # The place of a request is that of its most urgent text.
    assert place_of([job(priority=3), job(priority=-7), job()], 5.0, None) == pytest.approx(
        5.0 + HORIZON_S + 2 * FURTHER_TEXT_S - 7 * PRIORITY_S
    )


PRIORITIES = st.integers(LEAST_PRIORITY, MOST_PRIORITY)


@given(PRIORITIES, PRIORITIES, st.sampled_from([None, 0.01, 1.0]), st.booleans(), st.booleans())
def test_of_two_that_come_together_the_lower_number_goes_first(
    one: int, other: int, allowed_s: float | None, costs: bool, swapped: bool
) -> None:
    now, seconds = 7.0, TABLE if costs else None
    deadline = None if allowed_s is None else now + allowed_s
    jobs = [job(deadline=deadline, priority=priority) for priority in (one, other)]
    queue = JobQueue()
    for each in reversed(jobs) if swapped else jobs:
        queue.add([each], place_of([each], now, seconds))
    first = next(iter(queue))
    assert first.controls.priority == min(one, other)


ARRIVALS = st.lists(
    st.tuples(
        st.floats(0, 2),  # seconds after the one before
        PRIORITIES,
        st.sampled_from([1, 2, 32, 500]),
        st.sampled_from([None, None, 0.001, 0.3, 30.0]),
    ),
    min_size=2,
    max_size=40,
)


@given(ARRIVALS)
def test_nobody_waits_for_ever_whoever_comes(
    arrivals: Sequence[tuple[float, int, int, float | None]],
) -> None:
    """Whoever comes a certain time later stands behind, however urgent: from then on the queue
    before a text only shrinks."""
    late_s = 4 * TABLE(3)  # what a text itself needs
    shift_s = MOST_PRIORITY * PRIORITY_S
    queue, now = JobQueue(), 0.0
    came: dict[Job, float] = {}
    for gap_s, priority, count, allowed_s in arrivals:
        now += gap_s
        deadline = None if allowed_s is None else now + allowed_s
        jobs = [job(deadline=deadline, priority=priority) for _ in range(count)]
        queue.add(jobs, place_of(jobs, now, TABLE))
        came |= dict.fromkeys(jobs, now)
    order = {one: place for place, one in enumerate(queue)}
    firsts = list({came[one]: one for one in came}.values())  # one of each request will do
    for early in firsts:
        allowed_s = HORIZON_S if early.deadline is None else early.deadline - came[early]
        most_s = allowed_s + MOST_YIELDING_S + 2 * shift_s + late_s
        for later in firsts:
            if came[later] > came[early] + most_s:
                assert order[early] < order[later]
