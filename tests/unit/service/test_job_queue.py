"""Who is next: by latest start, then by arrival; and what stands before whom."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_model.cost import StepTable
from offramp_service.job_queue import HORIZON_S, JobQueue, latest_start
from offramp_service.jobs import Controls, Depth, Job

TABLE = StepTable((10, 1000), (0.001, 0.1))  # 0.1 ms a token


def job(tokens: int = 3, layers: int = 4, deadline: float | None = None) -> Job:
    one = Job([0] * tokens, [0] * tokens, Controls(0.5, 1, 4, Depth.full(layers)))
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
    needed = queue.seconds_before(2.0, mine, TABLE, budget=1000)
    assert needed == pytest.approx((100 * 2 + 50 * 4) * TABLE(150) / 150)
    # A table with a fixed price: small batches are dear by the token.
    steps = StepTable((10, 1000), (0.1, 0.1))
    assert queue.seconds_before(2.0, mine, steps, 1000) == pytest.approx(400 * 0.1 / 150)
    assert queue.seconds_before(2.0, mine, steps, budget=50) == pytest.approx(400 * 0.1 / 50)
    assert queue.seconds_before(0.0, [], TABLE, 1000) == 0.0
