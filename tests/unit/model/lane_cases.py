"""What the device lane is tested on: an encoder whose heads the short attention kernel takes."""

from typing import Any

import torch

from loading import load
from offramp_model.config import MultiExitConfig, PolicyOptions
from offramp_model.device_lane import Bucket, DeviceLane
from offramp_model.encoder import PackedEncoder
from offramp_model.heads import ExitHeads
from offramp_model.layer_loop import layer_loop, start_rows
from offramp_model.policies import make_supported_policy
from offramp_model.rows import Encoding, RowSettings, TokenBatch

fixtures: Any = load("tests/unit/model/conftest.py")

WIDTH, LAYERS, INNER, HEADS = 64, 3, 48, 2
BACKBONE = fixtures.BACKBONE | {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
EXITS = (1, 2, 3)


def make_stack(
    device: str = "cpu", dtype: torch.dtype = torch.float32, **changes: Any
) -> PackedEncoder:
    """Random weights; `changes` are of the configuration or of the backbone's."""
    backbone = BACKBONE | {key: changes.pop(key) for key in list(changes) if key in BACKBONE}
    config = MultiExitConfig(
        **{
            "num_layers": LAYERS,
            "hidden_size": WIDTH,
            "exit_layers": EXITS,
            "labels": ("a", "b", "c"),
            "max_length": 32,
            "gate_hidden": 5,
            "policies": PolicyOptions(vote_exponent=0.5, vote_fallback="majority"),
        }
        | changes
    )
    return PackedEncoder(
        backbone, _tensors().__getitem__, _heads(config), config, device=device, dtype=dtype
    )


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    shapes = {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.key": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "intermediate.dense": (INNER, WIDTH),
        "output.dense": (WIDTH, INNER),
    }
    tensors = {
        "embeddings.word_embeddings.weight": normal(50, WIDTH),
        "embeddings.position_embeddings.weight": normal(40, WIDTH),
        "embeddings.token_type_embeddings.weight": normal(2, WIDTH),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}."
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
        for name, (rows, columns) in shapes.items():
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns)
            tensors[f"{prefix}{name}.bias"] = normal(rows)
    for name in norms:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = normal(WIDTH) + 1, normal(WIDTH)
    return tensors


def _heads(config: MultiExitConfig) -> ExitHeads:
    torch.manual_seed(1)
    heads = ExitHeads(config)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


def make_lane(
    stack: PackedEncoder,
    policy: str,
    compact_after: frozenset[int] = frozenset(EXITS),
    backend: Any = "auto",
    sizes: tuple[tuple[int, int], ...] = ((64, 8), (256, 16)),
) -> DeviceLane:
    buckets = [Bucket(tokens, rows, 32, compact_after) for tokens, rows in sizes]
    made = make_supported_policy(policy, stack.config)
    return DeviceLane(stack, "gelu", made, buckets, backend=backend)


Answer = tuple[int, int, int, float, bool]


def of_lane(
    lane: DeviceLane, encodings: list[Encoding], settings: RowSettings, **options: Any
) -> dict[int, Answer]:
    return _collect(lane(TokenBatch.pack(encodings), settings, **options))


def of_loop(
    stack: PackedEncoder, policy: str, encodings: list[Encoding], settings: RowSettings
) -> dict[int, Answer]:
    made = make_supported_policy(policy, stack.config)
    batch = TokenBatch.pack(encodings)
    return _collect(layer_loop(stack, start_rows(stack, batch, made, settings), made))


def _collect(exits: Any) -> dict[int, Answer]:
    """By submitted row: exit layer, label, rows that ran there, signal, by policy."""
    found: dict[int, Answer] = {}
    for left in exits:
        columns = (left.row, left.label, left.signal, left.by_policy)
        for row, label, signal, by_policy in zip(*(c.tolist() for c in columns), strict=True):
            assert row not in found, f"row {row} left twice"
            found[row] = (left.exit_layer, label, left.rows_run, signal, by_policy)
    return found


def assert_same(found: dict[int, Answer], expected: dict[int, Answer], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for row, (*ours, signal, by_policy) in found.items():
        *theirs, other, by_other = expected[row]
        assert (ours, by_policy) == (theirs, by_other), f"row {row}"
        assert abs(signal - other) <= tolerance or signal != signal, f"row {row}"
