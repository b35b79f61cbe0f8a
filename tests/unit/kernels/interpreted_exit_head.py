"""The exit head under the interpreter, against its twin: decisions exact, signals within rounding.

Not collected by name: test_interpreter.py runs this file with TRITON_INTERPRET set.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from loading import load
from offramp_kernels import Dense, ExitSpec, GateWeights, SlotTable, exit_head
from offramp_kernels import exit_head_kernel as kernel_file
from offramp_kernels.exits import RULES

interpreting = load("tests/unit/kernels/interpreting.py")
NAN_IS_MEANT = pytest.mark.filterwarnings("ignore:invalid value encountered")
EXACT = ("exit_layer", "label", "by_policy", "last_label", "agreeing", "ballots")
SLOTS = 40


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows a program for few classes, too: the interpreter pays per program."""
    monkeypatch.setattr(kernel_file, "ROW_CONFIG_CLASSES", 0)


def dense(outputs: int, inputs: int, scale: float = 1.0) -> Dense:
    return Dense(torch.randn(outputs, inputs) * scale, torch.randn(outputs) * 0.1)


def make_spec(labels: int, width: int, **changed: Any) -> ExitSpec:
    """Weights of a size that spreads the signals; `pooler` is its width, `gate` its inner width."""
    pooled = 2 * width if changed.get("pooling") == "mean_cls" else width
    state = changed.get("pooler") or pooled
    inner = changed.get("gate")
    settings: dict[str, Any] = {
        "exit_layer": 4,
        "exit_number": 2,
        "is_last": False,
        "pooling": "cls",
        "classifier": dense(labels, state, 2 / state**0.5),
    }
    settings |= changed
    if changed.get("pooler"):
        settings["pooler"] = dense(state, pooled, pooled**-0.5)
    if inner is not None:
        hidden = dense(inner, state, state**-0.5) if inner else None
        settings["gate"] = GateWeights(dense(1, inner or state, 0.5), hidden)
    return ExitSpec(**settings)


class Batch:
    """Rows with every rule, dead and cancelled ones too; what must not be read is NaN or absurd."""

    def __init__(self, rows: int, labels: int, width: int, dtype: torch.dtype, **spec: Any) -> None:
        self.spec = make_spec(labels, width, **spec)
        n_alive = max(rows - 2, min(rows, 1))
        lengths = torch.randint(1, 8, (rows,))
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        tokens = int(self.cu_seqlens[n_alive])
        self.counts = torch.tensor([n_alive, tokens], dtype=torch.int32)
        self.hidden = torch.full((tokens + 3, width), torch.nan, dtype=dtype)
        self.hidden[:tokens] = torch.randn(tokens, width).to(dtype)
        self.cu_seqlens[n_alive + 1 :] = 2**30
        self.slots = torch.randperm(SLOTS)[:rows].int()
        self.slots[n_alive:] = 2**30
        self.table = SlotTable.empty(SLOTS, labels)
        self.fill_table(labels)

    def fill_table(self, labels: int) -> None:
        table = self.table
        table.rule.copy_(torch.randint(len(RULES), (SLOTS,)))
        table.threshold.copy_(0.35 + torch.rand(SLOTS).double() / 2)
        table.min_layer.copy_(torch.randint(1, 6, (SLOTS,)))
        table.max_layer.copy_(torch.randint(3, 9, (SLOTS,)))
        table.cancelled.copy_(torch.rand(SLOTS) < 0.1)
        table.exit_layer[torch.rand(SLOTS) < 0.1] = 2
        table.last_label.copy_(torch.randint(labels, (SLOTS,)))
        table.agreeing.copy_(torch.randint(3, (SLOTS,)))
        table.ballots[torch.arange(SLOTS), torch.randint(labels, (SLOTS,))] = 1025

    def run(self, table: SlotTable, backend: Any, **changed: Any) -> Tensor:
        rows = self.slots.shape[0]
        guarded = torch.ones(rows + 2, dtype=torch.bool)
        arguments = {"out": guarded[1:-1]} | changed
        keep = exit_head(
            *(self.hidden, self.cu_seqlens, self.counts, self.slots, self.spec, table),
            backend=backend,
            **arguments,
        )
        assert guarded[0]
        assert guarded[-1]
        return keep


def copy_of(table: SlotTable) -> SlotTable:
    return SlotTable(*(getattr(table, name).clone() for name in SlotTable.__slots__))


def check(batch: Batch, **changed: Any) -> None:
    ours, expected = copy_of(batch.table), copy_of(batch.table)
    expected_keep = batch.run(expected, "reference", **changed)
    keep = batch.run(ours, "triton", **changed)
    assert torch.equal(keep, expected_keep)
    check_tables(ours, expected)


def check_tables(ours: SlotTable, expected: SlotTable) -> None:
    for name in EXACT:
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    for name, limit in (("signal", 3e-6), ("logits", 1e-5)):
        first, second = getattr(ours, name), getattr(expected, name)
        assert torch.equal(first.isnan(), second.isnan())
        assert interpreting.distance(first.nan_to_num(), second.nan_to_num()) < limit


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        *((0, 2), (1, 3), (2, 16), (15, 17), (16, 77), (17, 150)),
        *((17, 2), (16, 3), (15, 16), (2, 17), (1, 77), (33, 3)),
    ],
)
def test_exit_equals_twin(rows: int, labels: int) -> None:
    check(Batch(rows, labels, 33, torch.float32, gate=0))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pooler", [None, 40])
@pytest.mark.parametrize("pooling", ["cls", "mean", "mean_cls"])
def test_every_head_equals_its_twin(pooling: str, pooler: int | None, dtype: torch.dtype) -> None:
    check(Batch(17, 3, 36, dtype, pooling=pooling, pooler=pooler, gate=5))


@pytest.mark.parametrize("pooling", ["cls", "mean_cls"])
def test_one_row_a_program(pooling: str) -> None:
    check(Batch(6, 3, 130, torch.float32, pooling=pooling, gate=3))


@NAN_IS_MEANT
@pytest.mark.usefixtures("tiles")
def test_at_the_last_exit_everybody_leaves() -> None:
    batch = Batch(17, 3, 16, torch.float32, is_last=True, exit_layer=6)
    batch.hidden[3] = torch.nan
    check(batch)
    assert not batch.run(batch.table, "triton").any()


@NAN_IS_MEANT
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_broken_rows_stay_and_equal_classes_give_the_first(value: float) -> None:
    batch = Batch(20, 3, 16, torch.float32, gate=0)
    batch.hidden[: batch.counts[1] // 2] = value
    batch.table.max_layer.fill_(9)
    check(batch)


@NAN_IS_MEANT
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("ties", [True, False])
def test_all_exits_of_a_model_with_compaction(ties: bool, compact: bool) -> None:
    """Thresholds on dyadic ties where a signal can be: 1/2 of two equal classes, margin 0."""
    model: Any = load("tests/unit/kernels/test_reference_exit.py")
    logits, gate = model.make_logits(ties)
    if ties:
        logits[..., 2] = -200.0  # two classes are left, and exp(-200) is 0
    tables = []
    for backend in ("reference", "triton"):
        torch.manual_seed(1)
        table = model.make_table("margin", torch.tensor([0.5, 0.0, 1.0, 2.0, 0.75]).double())
        table.rule[: model.ROWS] = torch.arange(model.ROWS) % len(RULES)
        model.run_exits(logits, gate, table, compact=compact, backend=backend)
        tables.append(table)
    check_tables(*tables)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("fallback", ["last", "majority"])
def test_vote_fallbacks(fallback: Any) -> None:
    batch = Batch(17, 4, 16, torch.float32, vote_fallback=fallback, is_last=True, exit_number=3)
    batch.table.rule.fill_(RULES.index("vote"))
    batch.table.ballots.copy_(torch.randint(0, 3, (SLOTS, 4)) * 1024)
    batch.table.ballots[batch.table.ballots > 0] += 1
    check(batch)


@pytest.mark.usefixtures("tiles")
def test_rows_that_moved_are_found_through_the_plan() -> None:
    batch = Batch(9, 3, 16, torch.float32)
    source = torch.tensor([0, 2, 3, 5, 6, 7, 8, -1, -1], dtype=torch.int32)
    batch.slots = torch.randperm(SLOTS)[:9].int()
    found = {}
    for backend in ("reference", "triton"):
        table, slots_out = copy_of(batch.table), torch.full((11,), 77, dtype=torch.int32)
        keep = batch.run(table, backend, source=source, slots_out=slots_out[1:-1])
        found[backend] = (keep.tolist(), slots_out.tolist(), table.exit_layer.tolist())
    assert found["triton"] == found["reference"]
    expected = batch.slots[source[:7].long()].tolist()
    assert found["triton"][1] == [77, *expected, -1, -1, 77]


@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_programs_does_not_matter(seed: int) -> None:
    batch = Batch(6, 3, 16, torch.float32, pooling="mean")
    straight, shuffled = copy_of(batch.table), copy_of(batch.table)
    keep = batch.run(straight, "triton")
    with interpreting.shuffled_programs(seed) as ran:
        assert torch.equal(batch.run(shuffled, "triton"), keep)
    assert len(ran) == len(set(ran)) == 6
    for name in SlotTable.__slots__:
        first, second = getattr(straight, name), getattr(shuffled, name)
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def test_what_an_exit_refuses() -> None:
    batch = Batch(3, 3, 16, torch.float32)
    batch.hidden = batch.hidden.double()
    with pytest.raises(ValueError, match=r"hidden cannot be torch\.float64"):
        batch.run(batch.table, "triton")
    batch.hidden = torch.randn(9, 17)[:, :16].contiguous().view(-1)[1:129].view(8, 16)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        batch.run(batch.table, "triton")
