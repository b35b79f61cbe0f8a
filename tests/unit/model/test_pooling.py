"""Pooling: every form against a plain loop, padded against packed, and its way to disk."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offramp_model.checkpoint import (
    EXITS,
    MANIFEST,
    CheckpointError,
    file_sha256,
    load_checkpoint,
)
from offramp_model.config import MultiExitConfig, Pooling
from offramp_model.encoder import PackedEncoder
from offramp_model.heads import ExitHeads, PoolingModule
from offramp_model.pooling import pool_packed
from offramp_model.recorded import record_exits
from offramp_model.rows import Encoding, PackedTokens

FORMS: tuple[Pooling, ...] = get_args(Pooling)
WIDTH, HEADS = 12, 3

row_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=8)
seeds = st.integers(0, 2**31)


def config_with(**changes: Any) -> MultiExitConfig:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": WIDTH,
        "exit_layers": (1, 2),
        "labels": ("a", "b"),
        "attention_heads": HEADS,
    }
    return MultiExitConfig(**(settings | changes))


def random_pooling(form: Pooling, seed: int) -> PoolingModule:
    """As trained: queries that are far from zero."""
    pooling = PoolingModule(config_with(pooling=form))
    generator = torch.Generator().manual_seed(seed)
    for parameter in pooling.parameters():
        nn.init.normal_(parameter, std=2.0, generator=generator)
    return pooling.requires_grad_(False)


def random_rows(lengths: list[int], seed: int) -> list[Tensor]:
    """Hidden states of each row, shortest first."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in sorted(lengths)]


def packed(rows: list[Tensor]) -> PackedTokens:
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    return PackedTokens(torch.cat([*rows, torch.zeros(0, WIDTH)]), offsets)


def by_numpy(pooling: PoolingModule, rows: list[Tensor]) -> Tensor:
    """As between segments of ONNX Runtime."""
    hidden, query = packed(rows), pooling.query
    arrays = PackedTokens(hidden.values.numpy(), hidden.cu_seqlens.numpy())
    return torch.from_numpy(
        pool_packed(pooling.form, arrays, None if query is None else query.numpy())
    )


def padded(rows: list[Tensor], fill: float) -> tuple[Tensor, Tensor]:
    """Hidden states [B, S, H], `fill` where there is no token, and the mask [B, S]."""
    longest = max(map(len, rows))
    hidden = torch.full((len(rows), longest, WIDTH), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        hidden[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return hidden, mask


def attended(row: Tensor, pooling: PoolingModule) -> list[float]:
    """Attention pooling of one row [S, H], number by number."""
    query = pooling.get_parameter("query").tolist()
    tokens, size = row.tolist(), WIDTH // HEADS
    pooled = []
    for head in range(HEADS):
        slices = [token[head * size : (head + 1) * size] for token in tokens]
        scores = [
            sum(a * b for a, b in zip(one, query[head], strict=True)) / math.sqrt(size)
            for one in slices
        ]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        pooled += [
            sum(w * one[place] for w, one in zip(weights, slices, strict=True)) / sum(weights)
            for place in range(size)
        ]
    return pooled


def mean_of(row: Tensor, _: PoolingModule) -> list[float]:
    return [sum(feature) / len(row) for feature in row.T.tolist()]


def first_of(row: Tensor, _: PoolingModule) -> list[float]:
    return list(row[0].tolist())


def largest_of(row: Tensor, _: PoolingModule) -> list[float]:
    return [max(feature) for feature in row.T.tolist()]


TWINS: dict[Pooling, Callable[[Tensor, PoolingModule], list[float]]] = {
    "cls": first_of,
    "mean": mean_of,
    "mean_cls": lambda row, pooling: mean_of(row, pooling) + first_of(row, pooling),
    "max_mean": lambda row, pooling: largest_of(row, pooling) + mean_of(row, pooling),
    "attention": attended,
}


@pytest.mark.parametrize("form", FORMS)
@given(lengths=row_lengths, seed=seeds)
def test_packed_and_padded_are_the_plain_loop(form: Pooling, lengths: list[int], seed: int) -> None:
    pooling, rows = random_pooling(form, seed), random_rows(lengths, seed)
    expected = torch.tensor([TWINS[form](row, pooling) for row in rows])
    hidden, mask = padded(rows, 1e9)
    for ours in (pooling.packed(packed(rows)), pooling(hidden, mask), by_numpy(pooling, rows)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@given(lengths=row_lengths, seed=seeds)
def test_padding_never_leaks(form: Pooling, lengths: list[int], seed: int) -> None:
    pooling, rows = random_pooling(form, seed), random_rows(lengths, seed)
    results, gradients = [], []
    for fill in (1e9, -1e9):
        hidden, mask = padded(rows, fill)
        hidden.requires_grad_()
        pooled = pooling(hidden, mask)
        pooled.square().sum().backward()
        results.append(pooled.detach())
        assert hidden.grad is not None
        assert hidden.grad[mask == 0].eq(0).all()
        gradients.append(hidden.grad)
    assert results[0].equal(results[1])
    assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize("form", FORMS)
@given(lengths=row_lengths, seed=seeds, data=st.data())
def test_a_row_does_not_depend_on_its_neighbours(
    form: Pooling, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    pooling, rows = random_pooling(form, seed), random_rows(lengths, seed)
    count = len(rows)
    stays = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    together = pooling.packed(packed(rows))
    survivors = pooling.packed(packed(rows).keep(stays))
    kept = [row for row, stay in zip(rows, stays.tolist(), strict=True) if stay]
    assert by_numpy(pooling, kept).equal(by_numpy(pooling, rows)[stays])
    torch.testing.assert_close(survivors, together[stays], rtol=1e-5, atol=1e-6)


@given(lengths=row_lengths, seed=seeds)
def test_fresh_attention_is_the_mean(lengths: list[int], seed: int) -> None:
    rows = random_rows(lengths, seed)
    fresh, mean = (PoolingModule(config_with(pooling=form)) for form in ("attention", "mean"))
    hidden, mask = padded(rows, 1e9)
    with torch.no_grad():
        torch.testing.assert_close(fresh(hidden, mask), mean(hidden, mask), rtol=1e-5, atol=1e-6)
        ours, theirs = fresh.packed(packed(rows)), mean.packed(packed(rows))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_heads_start_alike_and_queries_get_a_gradient_at_once() -> None:
    torch.manual_seed(0)
    attention = ExitHeads(config_with(pooling="attention"))
    torch.manual_seed(0)
    mean = ExitHeads(config_with(pooling="mean"))
    classifiers = {name: v for name, v in attention.state_dict().items() if "poolings" not in name}
    assert all(value.equal(mean.state_dict()[name]) for name, value in classifiers.items())
    hidden, mask = padded(random_rows([3, 5], seed=0), 0.0)
    attention(1, attention.pool_padded(1, hidden, mask)).square().sum().backward()
    first, second = (pooling.get_parameter("query").grad for pooling in attention.poolings)
    assert first is None  # each exit has queries of its own
    assert second is not None
    assert second.ne(0).all()


def test_each_attention_head_may_look_at_another_token() -> None:
    pooling = random_pooling("attention", seed=0)
    row = torch.randn(3, WIDTH)
    row[:, :8] = torch.randn(3, 2, 4).div(10).flatten(1)
    row[1, 0:4], row[2, 4:8] = 1.0, 1.0  # what the first and the second head look for
    query = pooling.get_parameter("query")
    query[0], query[1], query[2] = 100.0, 100.0, 0.0
    pooled = pooling.packed(packed([row]))[0]
    torch.testing.assert_close(pooled[0:4], row[1, 0:4])
    torch.testing.assert_close(pooled[4:8], row[2, 4:8])
    torch.testing.assert_close(pooled[8:], row[:, 8:].mean(dim=0))


@pytest.mark.parametrize("form", FORMS)
def test_one_token_is_its_own_pooling(form: Pooling) -> None:
    rows = random_rows([1, 1, 1], seed=0)
    pooled = random_pooling(form, seed=1).packed(packed(rows))
    for part in pooled.split(WIDTH, dim=1):
        assert part.equal(torch.cat(rows))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_rows_and_half_precision_keep_width_and_dtype(form: Pooling, dtype: torch.dtype) -> None:
    config = config_with(pooling=form)
    pooling = random_pooling(form, seed=0)
    empty = PackedTokens(torch.zeros(0, WIDTH, dtype=dtype), torch.zeros(1, dtype=torch.int32))
    assert pooling.packed(empty).shape == (0, config.pooled_size)
    rows = random_rows([4, 2, 2], seed=0)
    exact, half = packed(rows), packed([row.to(dtype) for row in rows])
    half = half.replace(half.values.to(dtype))
    pooled = pooling.packed(half)
    assert (pooled.shape, pooled.dtype) == ((3, config.pooled_size), dtype)
    torch.testing.assert_close(pooled.float(), pooling.packed(exact), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("pooler", ["none", "shared", "per_exit"])
@pytest.mark.parametrize("form", FORMS)
def test_poolers_classifiers_and_gates_fit_one_another(form: Pooling, pooler: Any) -> None:
    config = config_with(pooling=form, pooler=pooler, gate_hidden=4)
    heads = ExitHeads(config).eval()
    pooled = heads.head(0).pool(packed(random_rows([2, 5], seed=0)))
    assert pooled.shape == (2, config.pooled_size)
    state = heads.state(0, pooled)
    assert state.shape == (2, config.state_size)
    assert heads.classify(0, state).shape == (2, 2)
    chance = heads.exit_probability(0, state)
    assert chance is not None
    assert chance.shape == (2,)


def test_a_pooler_of_another_width_is_refused() -> None:
    dense = nn.Linear(WIDTH, WIDTH)
    heads = ExitHeads(config_with(pooling="attention", pooler="shared"))
    heads.init_pooler(dense)
    assert heads.poolers[0].get_parameter("weight").equal(dense.weight)
    wide = ExitHeads(config_with(pooling="mean_cls", pooler="shared"))
    with pytest.raises(ValueError, match="of 12 → 12 cannot start one of 24 → 12"):
        wide.init_pooler(dense)


@pytest.mark.parametrize("form", FORMS)
def test_law_5_holds_for_every_form(tmp_path: Path, write_tiny: Any, form: Pooling) -> None:
    directory = write_tiny(tmp_path / "model", checkpoint_config(pooling=form))
    stack = load_checkpoint(directory).stack()
    assert isinstance(stack, PackedEncoder)
    encodings = [Encoding([5 + i] * n, [0] * n) for i, n in enumerate((7, 1, 20, 7, 3, 7, 3))]
    together = record_exits(stack, encodings).logits
    alone = torch.cat([record_exits(stack, [encoding]).logits for encoding in encodings], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def checkpoint_config(**changes: Any) -> MultiExitConfig:
    """Of the tiny checkpoint: four layers, 16 wide."""
    shape = {"num_layers": 4, "hidden_size": 16, "exit_layers": (2, 4), "max_length": 32}
    return config_with(**(shape | {"labels": ("a", "b", "c"), "attention_heads": 4} | changes))


def test_queries_are_in_the_file_under_their_exits(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model", checkpoint_config(pooling="attention"))
    tensors = load_file(directory / EXITS)
    queries = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("poolings.")}
    assert queries == {"poolings.0.query": (4, 4), "poolings.1.query": (4, 4)}


def edit(directory: Path, tensors: Any = None, **model: Any) -> None:
    """Changes exit tensors and the manifest's model, and makes the hash agree."""
    if tensors is not None:
        kept = load_file(directory / EXITS)
        tensors(kept)
        save_file(kept, directory / EXITS)
    content = json.loads((directory / MANIFEST).read_text())
    content["sha256"][EXITS] = file_sha256(directory / EXITS)
    content["model"] |= model
    (directory / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("form", "tensors", "model", "message"),
    [
        ("attention", lambda t: t.pop("poolings.1.query"), {}, r"no tensor poolings\.1\.query"),
        (
            "attention",
            lambda t: t.update({"poolings.1.query": torch.zeros(2, 8)}),
            {},
            r"poolings\.1\.query has shape \(2, 8\), but .* pooling attention \(4 heads\), pooler "
            r"none ask for \(4, 4\)",
        ),
        ("attention", None, {"attention_heads": 2}, r"\(4, 4\), but .*\(2 heads\).* for \(2, 8\)"),
        ("attention", None, {"attention_heads": 3}, "3 does not divide hidden_size = 16"),
        ("attention", None, {"pooling": "mean"}, r"a tensor poolings\.0\.query that the manifest"),
        ("attention", None, {"pooling": "soft"}, "model.pooling: Input should be 'cls', 'mean'"),
        ("mean", None, {"pooling": "attention"}, r"has no tensor poolings\.0\.query"),
        ("mean", None, {"pooling": "mean_cls"}, r"shape \(3, 16\), but .* mean_cls.* \(3, 32\)"),
        ("max_mean", None, {"pooling": "cls"}, r"shape \(3, 32\), but .* cls.* \(3, 16\)"),
    ],
)
def test_tensors_of_another_form_are_refused(
    tmp_path: Path, write_tiny: Any, form: Any, tensors: Any, model: dict[str, Any], message: str
) -> None:
    directory = write_tiny(tmp_path / "model", checkpoint_config(pooling=form))
    edit(directory, tensors, **model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(directory)


@pytest.mark.parametrize("form", ["mean", "cls"])
def test_checkpoints_from_before_the_richer_forms_load(
    tmp_path: Path, write_tiny: Any, form: Any
) -> None:
    directory = write_tiny(tmp_path / "model", checkpoint_config(pooling=form))
    assert set(load_file(directory / EXITS)) == {
        f"classifiers.{exit_index}.{kind}" for exit_index in (0, 1) for kind in ("weight", "bias")
    }
    before = record_exits(load_checkpoint(directory).stack(), [Encoding([5, 6], [0, 0])]).logits
    content = json.loads((directory / MANIFEST).read_text())
    del content["model"]["attention_heads"]
    (directory / MANIFEST).write_text(json.dumps(content))
    opened = load_checkpoint(directory)
    assert opened.model.pooling_form == form
    assert record_exits(opened.stack(), [Encoding([5, 6], [0, 0])]).logits.equal(before)
