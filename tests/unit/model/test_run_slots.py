"""Every run in a slot of its own, in order, and no group at work with an idle slot."""

from hypothesis import given
from hypothesis import strategies as st

from offramp_model.rows import Run
from offramp_model.run_slots import GROUPS, MAX_RUNS, SHAPES, SINGLE, TOKENS, USED, plan_runs


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=MAX_RUNS))
def test_runs_fill_the_groups_that_are_at_work(sizes: list[tuple[int, int]]) -> None:
    runs, start = [], 0
    for rows, length in sizes:
        runs.append(Run(start, rows, length))
        start = runs[-1].stop
    plan = plan_runs(runs, 16)
    assert plan[SINGLE].tolist() == [len(runs) == 1]
    shapes = plan[SHAPES].reshape(MAX_RUNS, 3).tolist()
    filled = []
    for group, is_used in zip(GROUPS, plan[USED].tolist(), strict=True):
        slots = range(group - 1, 2 * group - 1)
        for slot in slots:
            assert plan[TOKENS][slot] == shapes[slot][0] * shapes[slot][1]
            assert bool(plan[TOKENS][slot]) == is_used
        filled += [shapes[slot] for slot in slots if is_used]
    assert filled == [[rows, length, 16] for rows, length in sizes]
