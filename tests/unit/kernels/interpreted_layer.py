"""An encoder layer's kernels under the interpreter, against their twins and an fp64 oracle.

Not collected by name: test_interpreter.py runs this file with TRITON_INTERPRET set.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loading import load
from offramp_kernels import add_layernorm, linear, varlen_attn
from offramp_kernels import linear_kernel as linear_file

interpreting = load("tests/unit/kernels/interpreting.py")
distance, guarded, untouched = interpreting.distance, interpreting.guarded, interpreting.untouched
TOLERANCE = interpreting.TOLERANCE
DTYPES = (torch.float32, torch.float16)
ROW_COUNTS = (0, 1, 2, 15, 16, 17)


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two row tiles a group: the interpreter pays for every program that has nothing to do."""
    monkeypatch.setattr(linear_file, "GROUP_ROWS", 2)


def poisoned(rows: int, live: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random live rows, the others NaN."""
    values = torch.full((rows, width), torch.nan, dtype=dtype)
    values[:live] = torch.randn(live, width).to(dtype)
    return values


def counts_of(texts: int, tokens: int) -> Tensor:
    return torch.tensor([texts, tokens], dtype=torch.int32)


def near(ours: Tensor, expected: Tensor) -> None:
    assert not ours.isnan().any()
    if ours.numel():
        assert distance(ours, expected) < TOLERANCE[ours.dtype]


# Linear


def linear_oracle(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    total = F.linear(x.double(), weight.double(), bias.double())
    if activation == "none":
        return total
    return F.gelu(total, approximate="tanh" if activation == "gelu_tanh" else "none")


def check_linear(
    rows: int,
    live: int | None,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    activation: Any = "none",
    residual: bool = False,
) -> None:
    n_live = rows if live is None else min(live, rows)
    x = poisoned(rows, n_live, inputs, dtype)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    other = poisoned(rows, n_live, outputs, dtype) if residual else None
    counts = None if live is None else counts_of(7, live)
    buffer, out = guarded(rows, outputs, dtype)
    settings = {"activation": activation, "residual": other, "counts": counts}
    assert linear(x, weight, bias, **settings, out=out, backend="triton") is out
    assert untouched(buffer, n_live)
    expected = linear_oracle(x[:n_live], weight, bias, activation)
    if other is not None:
        expected += other[:n_live].double()
    near(out[:n_live], expected)
    twin = linear(x, weight, bias, **settings, backend="reference")
    near(twin[:n_live], expected)


@pytest.mark.parametrize("rows", [*ROW_COUNTS, 65])
def test_linear_of_any_number_of_rows(rows: int) -> None:
    check_linear(rows, None, 33, 17, torch.float32)


@pytest.mark.parametrize("live", [0, 1, 64, 65, 130, 200])
def test_linear_leaves_rows_past_the_count_alone(live: int) -> None:
    check_linear(130, live, 16, 16, torch.float32, residual=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("residual", [True, False])
def test_linear_epilogues(dtype: torch.dtype, activation: Any, residual: bool) -> None:
    check_linear(5, 4, 40, 9, dtype, activation, residual)


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 70), st.integers(0, 70), st.integers(1, 70), st.integers(1, 70),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_linear_of_any_shape(
    rows: int, live: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    check_linear(rows, live, inputs, outputs, dtype)


def test_linear_in_the_large_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_file, "SMALL_ROWS", 0)
    check_linear(130, 129, 70, 130, torch.float16, residual=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gets_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    """Alone in a buffer of its own, last of many, and with others' rows NaN."""
    x, weight = torch.randn(66, 96).to(dtype), torch.randn(20, 96).to(dtype)
    bias = torch.randn(20).to(dtype)
    batch = linear(x, weight, bias, backend="triton")
    for row in (0, 15, 65):
        alone = linear(x[row : row + 1].clone(), weight, bias, backend="triton")
        assert torch.equal(alone[0], batch[row])
        among_nan = torch.full_like(x, torch.nan)
        among_nan[row] = x[row]
        assert torch.equal(linear(among_nan, weight, bias, backend="triton")[row], batch[row])


def test_linear_may_write_over_its_residual() -> None:
    x, weight, residual = torch.randn(5, 8), torch.randn(6, 8), torch.randn(5, 6)
    expected = linear(x, weight, torch.zeros(6), residual=residual, backend="triton")
    linear(x, weight, torch.zeros(6), residual=residual, out=residual, backend="triton")
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("seed", range(3))
def test_linear_in_any_order_of_programs(seed: int) -> None:
    x, weight, bias = torch.randn(130, 16), torch.randn(70, 16), torch.randn(70)
    residual = torch.randn(130, 70)
    expected = linear(x, weight, bias, residual=residual, backend="triton")
    with interpreting.shuffled_programs(seed) as ran:
        linear(x, weight, bias, residual=residual, out=residual, backend="triton")
    assert len(ran) == len(set(ran)) == 8  # 4 row tiles, one of them past the end, by 2
    assert torch.equal(residual, expected)


# Layer norm


def check_norm(
    rows: int,
    live: int | None,
    width: int,
    dtype: torch.dtype,
    *,
    residual: bool = True,
    input_bias: bool = False,
) -> None:
    n_live = rows if live is None else min(live, rows)
    x = poisoned(rows, n_live, width, dtype)
    other = poisoned(rows, n_live, width, dtype) if residual else None
    weight, bias, extra = (torch.randn(width).to(dtype) for _ in range(3))
    buffer, out = guarded(rows, width, dtype)
    settings = {
        "eps": 1e-12,
        "residual": other,
        "input_bias": extra if input_bias else None,
        "counts": None if live is None else counts_of(7, live),
    }
    assert add_layernorm(x, weight, bias, **settings, out=out, backend="triton") is out
    assert untouched(buffer, n_live)
    total = x[:n_live].double()
    total = total + other[:n_live].double() if other is not None else total
    total = total + extra.double() if input_bias else total
    expected = F.layer_norm(total, (width,), weight.double(), bias.double(), 1e-12)
    near(out[:n_live], expected)
    twin = add_layernorm(x, weight, bias, **settings, backend="reference")
    near(twin[:n_live], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 17, 128, 129, 384, 768, 1023, 1024])
def test_norm_of_any_width(width: int, dtype: torch.dtype) -> None:
    check_norm(9, 7, width, dtype, input_bias=True)


@pytest.mark.parametrize("live", [None, 0, 1, 16, 40])
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_norm_of_any_number_of_rows(rows: int, live: int | None) -> None:
    check_norm(rows, live, 33, torch.float32, residual=False)


def test_norm_does_not_cancel_far_from_zero() -> None:
    """Sums of squares in one pass would lose the variance of values near 1000."""
    x, one, zero = torch.randn(4, 128) + 1000, torch.ones(128), torch.zeros(128)
    ours = add_layernorm(x, one, zero, eps=1e-12, backend="triton")
    expected = F.layer_norm(x.double(), (128,), eps=1e-12)
    assert distance(ours, expected) < 1e-4  # x itself is only known to 6e-5


@pytest.mark.parametrize("seed", range(3))
def test_norm_in_place_in_any_order_of_programs(seed: int) -> None:
    x, residual = torch.randn(100, 20), torch.randn(100, 20)
    weight, bias = torch.randn(20), torch.randn(20)
    expected = add_layernorm(x, weight, bias, eps=1e-5, residual=residual, backend="triton")
    for out in (x.clone(), residual.clone()):
        with interpreting.shuffled_programs(seed) as ran:
            same = {"x": x, "residual": residual}
            same["x" if torch.equal(out, x) else "residual"] = out
            add_layernorm(
                same["x"],
                *(weight, bias),
                eps=1e-5,
                residual=same["residual"],
                out=out,
                backend="triton",
            )
        assert len(ran) == 4
        assert torch.equal(out, expected)


# Attention


def check_attention(
    lengths: list[int],
    live: int | None,
    dtype: torch.dtype,
    *,
    heads: int = 2,
    dim: int = 32,
    bound: int | None = None,
) -> None:
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    texts = len(lengths) if live is None else live
    tokens, width = int(cu_seqlens[texts]), heads * dim
    qkv = poisoned(int(cu_seqlens[-1]), tokens, 3 * width, dtype)
    if live is not None:
        cu_seqlens[texts + 1 :] = 2**30
    bound = bound or max([1, *lengths])
    counts = None if live is None else counts_of(live, 10**6)
    buffer, out = guarded(qkv.shape[0], width, dtype)
    settings = {"counts": counts}
    varlen_attn(qkv, cu_seqlens, heads, bound, **settings, out=out, backend="triton")
    assert untouched(buffer, tokens)
    expected = attention_oracle(qkv[:tokens], lengths[:texts], heads)
    near(out[:tokens], expected)
    twin = varlen_attn(qkv, cu_seqlens, heads, bound, **settings, backend="reference")
    near(twin[:tokens], expected)


def attention_oracle(qkv: Tensor, lengths: list[int], heads: int) -> Tensor:
    width = qkv.shape[1] // 3
    answers = [torch.empty(0, width, dtype=torch.float64)]
    for text in qkv.double().split(lengths):
        query, key, value = text.view(len(text), 3, heads, width // heads).permute(1, 2, 0, 3)
        scores = query @ key.transpose(1, 2) / (width // heads) ** 0.5
        answers.append((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
    return torch.cat(answers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("longest", [1, 16, 17, 33, 64, 65, 128])
def test_attention_of_every_block(longest: int, dim: int, dtype: torch.dtype) -> None:
    check_attention([1, longest, max(1, longest // 2)], None, dtype, dim=dim)


@pytest.mark.parametrize("live", [0, 1, 5, 16])
def test_attention_looks_at_live_texts_only(live: int) -> None:
    check_attention([3, 0, 16, 1, 7] * 3 + [4, 9], live, torch.float32)


@pytest.mark.parametrize("heads", [1, 3, 4, 6])
def test_attention_of_any_number_of_heads(heads: int) -> None:
    check_attention([5, 2], None, torch.float16, heads=heads, bound=32)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(0, 40), max_size=6), st.sampled_from(DTYPES))
def test_attention_of_any_batch(lengths: list[int], dtype: torch.dtype) -> None:
    check_attention(lengths, None, dtype, bound=64)


def test_a_text_gets_the_same_bits_alone_and_in_a_batch() -> None:
    qkv = torch.randn(30, 3 * 64)
    cu_seqlens = torch.tensor([0, 9, 20, 30], dtype=torch.int32)
    batch = varlen_attn(qkv, cu_seqlens, 2, 16, backend="triton")
    alone = varlen_attn(
        qkv[9:20].clone(), torch.tensor([0, 11], dtype=torch.int32), 2, 16, backend="triton"
    )
    assert torch.equal(alone, batch[9:20])


@pytest.mark.parametrize("seed", range(3))
def test_attention_in_any_order_of_programs(seed: int) -> None:
    qkv = torch.randn(60, 3 * 64)
    cu_seqlens = torch.tensor([0, 20, 21, 60], dtype=torch.int32)
    expected = varlen_attn(qkv, cu_seqlens, 2, 40, backend="triton")
    out = torch.full_like(expected, torch.nan)
    with interpreting.shuffled_programs(seed) as ran:
        varlen_attn(qkv, cu_seqlens, 2, 40, out=out, backend="triton")
    assert len(ran) == len(set(ran)) == 24  # 3 texts, 2 heads, 4 blocks of queries
    assert torch.equal(out, expected)


def test_a_text_longer_than_the_block_writes_nothing_past_it() -> None:
    qkv, cu_seqlens = torch.randn(40, 3 * 32), torch.tensor([0, 40], dtype=torch.int32)
    buffer, out = guarded(40, 32, torch.float32)
    varlen_attn(qkv, cu_seqlens, 1, 16, out=out, backend="triton")
    assert untouched(buffer, 16)


def test_launchers_refuse_what_they_cannot_do() -> None:
    x, vector = torch.randn(4, 8), torch.randn(8)
    weight = torch.randn(8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="linear has no backward"):
        linear(x, weight, vector, backend="triton")
    with pytest.raises(ValueError, match="out must not overlap x"):
        linear(x, weight.detach(), vector, out=x, backend="triton")
    buffer = torch.randn(5, 8)
    with pytest.raises(ValueError, match="out must be x itself"):
        add_layernorm(buffer[:4], vector, vector, eps=1e-5, out=buffer[1:], backend="triton")
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        add_layernorm(torch.randn(4, 3)[1:], vector[:3], vector[:3], eps=1e-5, backend="triton")
