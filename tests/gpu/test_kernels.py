"""The compiled kernels on a device, against their twins; skipped without one.

Copies and integers bit for bit, sums within the rounding of their dtype.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp_kernels import (
    CompactPlan,
    Dense,
    ExitSpec,
    GateWeights,
    SlotTable,
    add_layernorm,
    compact_plan,
    exit_head,
    gather_rows,
    linear,
    varlen_attn,
)
from offramp_kernels.exits import RULES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NO_PROTOTYPE_WARNING = pytest.mark.filterwarnings(
    "ignore:Synchronization debug mode is a prototype"
)


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    torch.manual_seed(0)


def make_batch(rows: int, longest: int, kept: float = 0.6) -> tuple[Tensor, Tensor]:
    keep = torch.rand(rows, device="cuda") < kept
    lengths = torch.randint(1, longest + 1, (rows,), device="cuda")
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return keep, cu_seqlens


def make_values(keep: Tensor, cu_seqlens: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Random survivors, NaN leavers."""
    alive = keep.repeat_interleave(cu_seqlens.diff().long())
    values = torch.randn(len(alive), width, device="cuda", dtype=dtype)
    values[~alive] = torch.nan
    return values


def same_plan(first: CompactPlan, second: CompactPlan) -> bool:
    return (
        torch.equal(first.source, second.source)
        and torch.equal(first.cu_seqlens, second.cu_seqlens)
        and torch.equal(first.counts, second.counts)
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.dtype])


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 128, 129, 1024, 1025, 4096])
def test_plan_equals_twin(rows: int, kept: float) -> None:
    keep, cu_seqlens = make_batch(rows, 512, kept)
    expected = compact_plan(keep, cu_seqlens, backend="reference")
    for _ in range(5):
        assert same_plan(compact_plan(keep, cu_seqlens), expected)


@pytest.mark.parametrize("dtype", list(INTEGERS))
@pytest.mark.parametrize("width", [1, 17, 128, 384, 768, 1024])
@pytest.mark.parametrize("rows", [1, 17, 512])
def test_gather_equals_twin(rows: int, width: int, dtype: torch.dtype) -> None:
    """Several runs: an answer that moves is a race."""
    keep, cu_seqlens = make_batch(rows, 128)
    values = make_values(keep, cu_seqlens, width, dtype)
    plan = compact_plan(keep, cu_seqlens)
    expected = torch.full_like(values, torch.nan)
    gather_rows(values, cu_seqlens, plan, out=expected, backend="reference")
    for _ in range(5):
        out = torch.full_like(values, torch.nan)
        assert gather_rows(values, cu_seqlens, plan, out=out) is out
        assert torch.equal(bits(out), bits(expected))
    _, t_alive = plan.read_counts()
    packed = gather_rows(values, cu_seqlens, plan)
    assert torch.equal(bits(packed), bits(expected[:t_alive]))


def test_offsets_past_two_to_the_31_elements() -> None:
    width, length, rows = 1024, 300_000, 8
    needed = 3 * length * rows * width * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of device memory")
    cu_seqlens = torch.arange(0, (rows + 1) * length, length, device="cuda", dtype=torch.int32)
    keep = torch.arange(rows, device="cuda") > 0
    values = torch.randn(rows * length, width, device="cuda", dtype=torch.bfloat16)
    packed = gather_rows(values, cu_seqlens, compact_plan(keep, cu_seqlens))
    assert torch.equal(packed, values[length:])


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NO_PROTOTYPE_WARNING
def test_nothing_waits_when_out_is_given() -> None:
    keep, cu_seqlens = make_batch(32, 64)
    values = make_values(keep, cu_seqlens, 384, torch.float16)
    out = torch.empty_like(values)
    gather_rows(values, cu_seqlens, compact_plan(keep, cu_seqlens), out=out)  # compiles
    with waiting_is_an_error():
        gather_rows(values, cu_seqlens, compact_plan(keep, cu_seqlens), out=out)


def test_a_captured_graph_follows_the_flags_and_the_lengths() -> None:
    keep, cu_seqlens = make_batch(32, 64)
    values = torch.randn(32 * 64, 384, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(values)
    gather_rows(values, cu_seqlens, compact_plan(keep, cu_seqlens), out=out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = compact_plan(keep, cu_seqlens)
        gather_rows(values, cu_seqlens, plan, out=out)
    for kept in (0.9, 0.5, 0.0, 1.0):
        new_keep, new_cu_seqlens = make_batch(32, 64, kept)
        keep.copy_(new_keep)
        cu_seqlens.copy_(new_cu_seqlens)
        out.fill_(torch.nan)
        graph.replay()
        expected = compact_plan(keep, cu_seqlens, backend="reference")
        assert same_plan(plan, expected)
        packed = gather_rows(values, cu_seqlens, expected, backend="reference")
        assert torch.equal(out[: packed.shape[0]], packed)
        assert out[packed.shape[0] :].isnan().all()


def near(ours: Tensor, expected: Tensor) -> None:
    """Within the dtype's rounding in the Euclidean norm; the twin computes in fp32."""
    assert not ours.isnan().any()
    error = (ours.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert float(error) < TOLERANCE[ours.dtype]


def poisoned(rows: int, live: int, width: int, dtype: torch.dtype) -> Tensor:
    values = torch.full((rows, width), torch.nan, device="cuda", dtype=dtype)
    values[:live] = torch.randn(live, width, device="cuda").to(dtype)
    return values


def counts_of(texts: int, tokens: int) -> Tensor:
    return torch.tensor([texts, tokens], device="cuda", dtype=torch.int32)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "live"), [(1, 1), (17, 16), (1024, 700), (1025, 1025), (4096, 2049)]
)
@pytest.mark.parametrize(
    ("inputs", "outputs", "activation"),
    [(768, 3072, "gelu"), (384, 1536, "gelu_tanh"), (3072, 768, "none"), (100, 33, "none")],
)
def test_linear_equals_twin(
    inputs: int, outputs: int, activation: Any, rows: int, live: int, dtype: torch.dtype
) -> None:
    x = poisoned(rows, live, inputs, dtype)
    weight = (torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, device="cuda").to(dtype)
    residual = poisoned(rows, live, outputs, dtype)
    settings = {"activation": activation, "residual": residual, "counts": counts_of(3, live)}
    expected = linear(x, weight, bias, **settings, backend="reference")
    first = None
    for _ in range(3):
        out = torch.full((rows, outputs), torch.nan, device="cuda", dtype=dtype)
        linear(x, weight, bias, **settings, out=out)
        near(out[:live], expected[:live])
        assert out[live:].isnan().all()
        first = out if first is None else first
        assert torch.equal(out[:live], first[:live])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_row_gets_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    """In a buffer of one row, of the small tile's many, and of the large tile's."""
    x = torch.randn(4096, 768, device="cuda").to(dtype)
    weight, bias = torch.randn(768, 768, device="cuda").to(dtype), torch.zeros(768, device="cuda")
    large = linear(x, weight, bias.to(dtype))
    small = linear(x[:512].clone(), weight, bias.to(dtype))
    for row in (0, 77, 511):
        alone = linear(x[row : row + 1].clone(), weight, bias.to(dtype))
        assert torch.equal(alone[0], small[row])
        others = torch.full_like(x, torch.nan)
        others[row] = x[row]
        assert torch.equal(linear(others, weight, bias.to(dtype))[row], large[row])
    # Both tiles walk K in the same steps; that they also agree in bits is not promised.
    near(small, large[:512].float())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [17, 128, 384, 768, 1024])
@pytest.mark.parametrize(("rows", "live"), [(1, 1), (33, 17), (5000, 4001)])
def test_norm_equals_twin(rows: int, live: int, width: int, dtype: torch.dtype) -> None:
    x, residual = poisoned(rows, live, width, dtype), poisoned(rows, live, width, dtype)
    weight, bias, extra = (torch.randn(width, device="cuda").to(dtype) for _ in range(3))
    settings = {"eps": 1e-12, "residual": residual, "input_bias": extra}
    settings["counts"] = counts_of(3, live)
    expected = add_layernorm(x, weight, bias, **settings, backend="reference")
    out = torch.full_like(x, torch.nan)
    add_layernorm(x, weight, bias, **settings, out=out)
    near(out[:live], expected[:live])
    assert out[live:].isnan().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("longest", [1, 16, 32, 64, 100, 128])
def test_attention_equals_twin(longest: int, dim: int, dtype: torch.dtype) -> None:
    _, cu_seqlens = make_batch(64, longest)
    live, tokens = 50, int(cu_seqlens[50])
    qkv = poisoned(int(cu_seqlens[-1]), tokens, 3 * 12 * dim, dtype)
    counts = counts_of(live, tokens)
    expected = varlen_attn(qkv, cu_seqlens, 12, longest, counts=counts, backend="reference")
    out = torch.full_like(expected, torch.nan)
    varlen_attn(qkv, cu_seqlens, 12, longest, counts=counts, out=out)
    near(out[:tokens], expected[:tokens])
    assert out[tokens:].isnan().all()


def make_spec(labels: int, pooling: Any, pooler: bool, **changed: Any) -> ExitSpec:
    def dense(outputs: int, inputs: int) -> Dense:
        weight = torch.randn(outputs, inputs, device="cuda") * (2 / inputs**0.5)
        return Dense(weight, torch.randn(outputs, device="cuda") * 0.1)

    pooled = 2 * 384 if pooling == "mean_cls" else 384
    state = 384 if pooler else pooled
    settings: dict[str, Any] = {
        "classifier": dense(labels, state),
        "exit_layer": 4,
        "exit_number": 2,
        "is_last": False,
        "pooling": pooling,
        "pooler": dense(state, pooled) if pooler else None,
        "gate": GateWeights(dense(1, 32), dense(32, state)),
    }
    return ExitSpec(**(settings | changed))


def make_table(slots: int, labels: int) -> SlotTable:
    table = SlotTable.empty(slots, labels, "cuda")
    table.rule.random_(0, len(RULES))
    table.threshold.uniform_(0.3, 0.9)
    table.min_layer.random_(1, 6)
    table.max_layer.random_(3, 9)
    table.cancelled.copy_(torch.rand(slots) < 0.1)
    return table


def copy_of(table: SlotTable) -> SlotTable:
    return SlotTable(*(getattr(table, name).clone() for name in SlotTable.__slots__))


def same_answers(ours: SlotTable, expected: SlotTable) -> bool:
    """Decisions exact, signals within rounding."""
    exact = ("exit_layer", "label", "by_policy", "last_label", "agreeing", "ballots")
    torch.testing.assert_close(ours.signal, expected.signal, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4, equal_nan=True)
    return all(torch.equal(getattr(ours, name), getattr(expected, name)) for name in exact)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean", "mean_cls"])
@pytest.mark.parametrize("labels", [2, 17, 150])
@pytest.mark.parametrize("rows", [1, 17, 128])
def test_exit_equals_twin(
    rows: int, labels: int, pooling: Any, pooler: bool, dtype: torch.dtype
) -> None:
    _, cu_seqlens = make_batch(rows, 64)
    hidden = torch.randn(int(cu_seqlens[-1]), 384, device="cuda").to(dtype)
    slots = torch.randperm(2 * rows, device="cuda")[:rows].int()
    counts = counts_of(max(1, rows - 3), 0)
    spec, table = make_spec(labels, pooling, pooler), make_table(2 * rows, labels)
    ours, expected = copy_of(table), copy_of(table)
    expected_keep = exit_head(
        hidden, cu_seqlens, counts, slots, spec, expected, backend="reference"
    )
    keep = exit_head(hidden, cu_seqlens, counts, slots, spec, ours)
    assert torch.equal(keep, expected_keep)
    assert same_answers(ours, expected)


def layer_step(
    tensors: dict[str, Tensor], spec: ExitSpec, table: SlotTable, plan: CompactPlan
) -> tuple[Tensor, CompactPlan, Tensor]:
    """A small layer, an exit and the move to the next: what one graph of a lane holds."""
    qkv = linear(tensors["hidden"], tensors["weight"], tensors["bias"], counts=plan.counts)
    context = varlen_attn(qkv, plan.cu_seqlens, 12, 64, counts=plan.counts)
    hidden = add_layernorm(
        context,
        tensors["scale"],
        tensors["shift"],
        eps=1e-12,
        residual=tensors["hidden"],
        counts=plan.counts,
    )
    slots_out = torch.empty_like(tensors["slots"])
    keep = exit_head(
        *(hidden, plan.cu_seqlens, plan.counts, tensors["slots"], spec, table),
        source=plan.source,
        slots_out=slots_out,
    )
    moved = compact_plan(keep, plan.cu_seqlens)
    gather_rows(hidden, plan.cu_seqlens, moved, out=tensors["next"])
    return keep, moved, slots_out


def make_step() -> tuple[dict[str, Tensor], ExitSpec, SlotTable, CompactPlan]:
    rows = 32
    keep, cu_seqlens = make_batch(rows, 64, 0.8)
    half = torch.bfloat16
    tensors = {
        "hidden": torch.randn(rows * 64, 384, device="cuda", dtype=half),
        "next": torch.empty(rows * 64, 384, device="cuda", dtype=half),
        "weight": torch.randn(3 * 384, 384, device="cuda").mul_(0.05).to(half),
        "bias": torch.randn(3 * 384, device="cuda").to(half),
        "scale": torch.ones(384, device="cuda", dtype=half),
        "shift": torch.zeros(384, device="cuda", dtype=half),
        "slots": torch.randperm(rows, device="cuda").int(),
    }
    return tensors, make_spec(6, "mean", False), make_table(rows, 6), compact_plan(keep, cu_seqlens)


@NO_PROTOTYPE_WARNING
def test_a_layer_and_its_exit_do_not_wait() -> None:
    step = make_step()
    layer_step(*step)  # compiles
    with waiting_is_an_error():
        layer_step(*step)


def test_a_captured_layer_follows_counts_settings_and_cancel_words() -> None:
    tensors, spec, table, plan = make_step()
    layer_step(tensors, spec, copy_of(table), plan)  # compiles
    live = copy_of(table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep, moved, slots_out = layer_step(tensors, spec, live, plan)
    for kept in (0.9, 0.5, 0.0, 1.0):
        new_keep, new_cu_seqlens = make_batch(32, 64, kept)
        new_plan = compact_plan(new_keep, new_cu_seqlens)
        for name in ("source", "cu_seqlens", "counts"):
            getattr(plan, name).copy_(getattr(new_plan, name))
        fresh = make_table(32, 6)
        for name in SlotTable.__slots__:
            getattr(live, name).copy_(getattr(fresh, name))
        graph.replay()
        answer = copy_of(live)
        again_keep, again, again_slots = layer_step(tensors, spec, fresh, new_plan)
        assert torch.equal(keep, again_keep)
        assert torch.equal(slots_out, again_slots)
        assert same_plan(moved, again)
        assert same_answers(answer, fresh)
