"""The exit head's twin against the model's own policies and pooling, exit by exit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from offramp_kernels import (
    Dense,
    ExitSpec,
    GateWeights,
    SlotTable,
    compact_plan,
    exit_head,
)
from offramp_kernels.dispatch import Backend
from offramp_kernels.exits import GIVEN_UP, RULES
from offramp_model.config import MultiExitConfig
from offramp_model.heads import ExitHeads
from offramp_model.layer_loop import layer_loop
from offramp_model.policies import POLICIES, HeadOutput, VotePolicy, make_policy
from offramp_model.rows import ActiveRows, PackedTokens

EXIT_LAYERS = (1, 2, 4, 5, 6)
ROWS, LABELS = 40, 3


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    torch.manual_seed(0)


class Recorded:
    """A LayerStack whose hidden states are row numbers and whose heads look logits up."""

    exit_layers = EXIT_LAYERS
    num_layers = EXIT_LAYERS[-1]
    num_labels = LABELS

    def __init__(self, logits: Tensor, gate: Tensor) -> None:
        self.logits, self.gate = logits, gate

    def segment(self, exit_layer: int, hidden: PackedTokens) -> PackedTokens:
        return hidden

    def exit_head(self, exit_layer: int, hidden: PackedTokens) -> HeadOutput:
        row, number = hidden.values[:, 0].long(), EXIT_LAYERS.index(exit_layer)
        is_last = exit_layer == self.num_layers
        gate = torch.ones(len(row)) if is_last else torch.sigmoid(self.gate[number, row])
        return HeadOutput(self.logits[number, row], gate)


def make_logits(ties: bool) -> tuple[Tensor, Tensor]:
    """Logits [E, n, C] and gate logits [E, n]; with ties on a coarse grid; some rows NaN."""
    shape = (len(EXIT_LAYERS), ROWS, LABELS)
    logits = torch.randint(-2, 3, shape) / 2 if ties else torch.randn(shape)
    logits[torch.rand(shape[:2]) < 0.1] = torch.nan
    gate = torch.randint(-1, 2, shape[:2]).float() if ties else torch.randn(shape[:2])
    return logits, gate


def make_spec(number: int, **changed: Any) -> ExitSpec:
    """An exit that reads logits and the gate's logit straight from the hidden state."""
    eye = torch.eye(LABELS + 1)
    settings: dict[str, Any] = {
        "classifier": Dense(eye[:LABELS].contiguous(), torch.zeros(LABELS)),
        "gate": GateWeights(Dense(eye[LABELS:].contiguous(), torch.zeros(1))),
        "exit_layer": EXIT_LAYERS[number],
        "exit_number": number + 1,
        "is_last": number + 1 == len(EXIT_LAYERS),
        "pooling": "cls",
    }
    return ExitSpec(**(settings | changed))


def run_exits(
    logits: Tensor,
    gate: Tensor,
    table: SlotTable,
    *,
    compact: bool,
    backend: Backend = "reference",
    **changed: Any,
) -> None:
    """All exits over one-token texts, with or without moving the survivors together."""
    rows = logits.shape[1]
    slots, spare = torch.randperm(table.capacity)[:rows].int(), torch.empty(rows, dtype=torch.int32)
    first_slots = slots.long()
    for name in ("rule", "threshold", "min_layer", "max_layer"):
        column = getattr(table, name)
        column[first_slots] = column[:rows].clone()
    numbers = torch.arange(rows)
    cu_seqlens, source = torch.arange(rows + 1, dtype=torch.int32), None
    counts = torch.tensor([rows, rows], dtype=torch.int32)
    for number in range(len(EXIT_LAYERS)):
        hidden = torch.full((rows, LABELS + 1), torch.nan)
        n_alive = int(counts[0])
        hidden[:n_alive, :LABELS] = logits[number, numbers[:n_alive]]
        hidden[:n_alive, LABELS] = gate[number, numbers[:n_alive]]
        keep = exit_head(
            *(hidden, cu_seqlens, counts, slots, make_spec(number, **changed), table),
            source=source,
            slots_out=spare if compact else None,
            backend=backend,
        )
        assert not keep[n_alive:].any()
        if not compact:
            continue
        slots, spare = spare, slots
        plan = compact_plan(keep, cu_seqlens)
        cu_seqlens, counts, source = plan.cu_seqlens, plan.counts, plan.source
        numbers = numbers[source[: int(counts[0])].long()]
    for name in ("exit_layer", "label", "signal", "by_policy", "logits"):
        column = getattr(table, name)
        column[:rows] = column[first_slots].clone()


def run_policy(policy: Any, logits: Tensor, gate: Tensor, table: SlotTable) -> dict[str, Tensor]:
    """The layer loop's answers, row by row."""
    rows = ActiveRows(
        hidden=PackedTokens(
            torch.arange(float(ROWS))[:, None], torch.arange(ROWS + 1, dtype=torch.int32)
        ),
        row=torch.arange(ROWS),
        threshold=table.threshold[:ROWS].clone(),
        min_layer=table.min_layer[:ROWS].long(),
        max_layer=table.max_layer[:ROWS].long(),
        alive=torch.ones(ROWS, dtype=torch.bool),
        state=policy.initial_state(ROWS, LABELS, table.threshold),
    )
    found = {
        "exit_layer": torch.zeros(ROWS, dtype=torch.int32),
        "label": torch.zeros(ROWS, dtype=torch.int32),
        "signal": torch.zeros(ROWS, dtype=torch.float64),
        "by_policy": torch.zeros(ROWS, dtype=torch.bool),
        "logits": torch.zeros(ROWS, LABELS),
    }
    stack: Any = Recorded(logits, gate)
    for leavers in layer_loop(stack, rows, policy):
        found["exit_layer"][leavers.row] = leavers.exit_layer
        found["label"][leavers.row] = leavers.label.int()
        found["signal"][leavers.row] = leavers.signal.double()
        found["by_policy"][leavers.row] = leavers.by_policy
        found["logits"][leavers.row] = leavers.logits
    return found


def make_table(rule: str, thresholds: Tensor) -> SlotTable:
    """More slots than rows; the first lines are the rows' settings, in order."""
    table = SlotTable.empty(ROWS + 9, LABELS)
    table.rule.fill_(RULES.index(rule))
    table.threshold[:ROWS] = thresholds[torch.randint(len(thresholds), (ROWS,))]
    table.min_layer[:ROWS] = torch.randint(1, 4, (ROWS,))
    table.max_layer[:ROWS] = torch.randint(3, 9, (ROWS,))
    return table


def signals_of(policy: Any, logits: Tensor, gate: Tensor) -> Tensor:
    """Every signal that occurs when nobody leaves early: thresholds that are met exactly."""
    table = SlotTable.empty(ROWS, LABELS)
    found = [run_policy(policy, logits, gate, table)["signal"]]
    for last in EXIT_LAYERS[:-1]:
        table.max_layer.fill_(last)
        found.append(run_policy(policy, logits, gate, table)["signal"])
    signals = torch.cat(found).unique()
    return signals[~signals.isnan()]


def test_the_rules_are_the_policies() -> None:
    assert tuple(POLICIES) == RULES


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_answers_like_its_policy(rule: str, ties: bool, compact: bool) -> None:
    policy = make_policy(rule)
    logits, gate = make_logits(ties)
    for _ in range(3):
        table = make_table(rule, signals_of(policy, logits, gate))
        expected = run_policy(policy, logits, gate, table)
        assert expected["exit_layer"].unique().numel() > 2  # or there is nothing to see
        run_exits(logits, gate, table, compact=compact)
        for name, values in expected.items():
            torch.testing.assert_close(
                getattr(table, name)[:ROWS], values, rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("fallback", ["last", "majority"])
@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.9])
def test_votes_of_any_exponent_and_fallback(exponent: float, fallback: Any) -> None:
    policy = VotePolicy(exponent=exponent, fallback=fallback)
    logits, gate = make_logits(ties=True)
    table = make_table("vote", signals_of(policy, logits, gate))
    expected = run_policy(policy, logits, gate, table)
    run_exits(logits, gate, table, compact=True, vote_exponent=exponent, vote_fallback=fallback)
    for name, values in expected.items():
        torch.testing.assert_close(
            getattr(table, name)[:ROWS], values, rtol=0, atol=0, equal_nan=True
        )


def test_rules_may_be_mixed_in_one_batch() -> None:
    """A row gets what it gets in a batch of its own rule."""
    logits, gate = make_logits(ties=False)
    mixed = make_table("confidence", torch.tensor([0.45, 0.5, 0.6, 2.0]).double())
    mixed.rule[:ROWS] = torch.arange(ROWS, dtype=torch.int32) % len(RULES)
    expected = {
        rule: run_policy(make_policy(rule), logits, gate, mixed)["exit_layer"] for rule in RULES
    }
    rules = mixed.rule[:ROWS].clone()
    run_exits(logits, gate, mixed, compact=True)
    for number, rule in enumerate(RULES):
        ours = rules == number
        assert torch.equal(mixed.exit_layer[:ROWS][ours], expected[rule][ours])


def test_a_cancelled_row_is_given_up_without_an_answer() -> None:
    table = SlotTable.empty(3, LABELS)
    table.cancelled[1] = 1
    slots = torch.arange(3, dtype=torch.int32)
    arguments = (
        torch.randn(3, LABELS + 1),
        torch.arange(4, dtype=torch.int32),
        torch.tensor([3, 3], dtype=torch.int32),
        slots,
    )
    assert exit_head(*arguments, make_spec(0), table).tolist() == [True, False, True]
    assert table.exit_layer.tolist() == [-1, GIVEN_UP, -1]
    table.cancelled.zero_()  # too late
    exit_head(*arguments, make_spec(len(EXIT_LAYERS) - 1), table)
    assert table.exit_layer.tolist() == [EXIT_LAYERS[-1], GIVEN_UP, EXIT_LAYERS[-1]]
    assert table.label[1] == -1
    assert table.logits[1].isnan().all()


def test_an_answer_is_never_overwritten() -> None:
    table = SlotTable.empty(2, LABELS)
    table.max_layer[0] = 1
    arguments = (
        torch.arange(3, dtype=torch.int32),
        torch.tensor([2, 2], dtype=torch.int32),
        torch.arange(2, dtype=torch.int32),
    )
    first = torch.randn(2, LABELS + 1)
    assert exit_head(first, *arguments, make_spec(0), table).tolist() == [False, True]
    answer = table.logits[0].clone()
    keep = exit_head(torch.randn(2, LABELS + 1), *arguments, make_spec(4), table)
    assert not keep.any()
    assert torch.equal(table.logits[0], answer)
    assert table.exit_layer.tolist() == [1, 6]


@pytest.mark.parametrize("gate_hidden", [0, 5])
@pytest.mark.parametrize("pooler", ["none", "per_exit"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "mean_cls"])
def test_the_head_computes_what_the_model_computes(
    pooling: Any, pooler: Any, gate_hidden: int
) -> None:
    config = MultiExitConfig(
        num_layers=2,
        hidden_size=12,
        exit_layers=(1, 2),
        labels=("a", "b", "c"),
        pooling=pooling,
        pooler=pooler,
        gate_hidden=gate_hidden,
    )
    heads = ExitHeads(config).eval().requires_grad_(False)
    for parameter in heads.parameters():
        parameter.normal_()
    lengths = torch.tensor([3, 1, 7])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    hidden = torch.randn(11, 12)
    expected = heads.answer(0, PackedTokens(hidden, cu_seqlens))

    table = SlotTable.empty(3, 3)
    table.rule.fill_(RULES.index("gate"))
    table.max_layer.fill_(1)
    exit_head(
        hidden,
        cu_seqlens,
        torch.tensor([3, 11], dtype=torch.int32),
        torch.arange(3, dtype=torch.int32),
        spec_of(heads, 0, pooling),
        table,
    )
    torch.testing.assert_close(table.logits, expected.logits)
    torch.testing.assert_close(table.signal.float(), expected.gate)


def spec_of(heads: ExitHeads, index: int, pooling: Any) -> ExitSpec:
    def dense(linear: Any) -> Dense:
        return Dense(linear.weight, linear.bias)

    gate: Any = heads.gates[index]
    return ExitSpec(
        classifier=dense(heads.classifiers[index]),
        exit_layer=index + 1,
        exit_number=index + 1,
        is_last=False,
        pooling=pooling,
        pooler=dense(heads.poolers[index]) if heads.poolers else None,
        gate=GateWeights(dense(gate.out), None if gate.hidden is None else dense(gate.hidden)),
    )
