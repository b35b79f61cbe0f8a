"""A whole pass over a batch without the host in it: the layer loop's twin for GPUs.

`layer_loop` asks the device after every exit how many rows are left. Here that number stays on the
device: every kernel reads it there and returns at once where nobody is left, so the pass is a fixed
list of launches, captured once per size of batch as a CUDA graph and replayed. Each exit copies the
answers latched so far to the host while the next layers run, and the host hands them on as they
land. `layer_loop` is the reference: what this yields is tested to be the same.

Buffers have the bucket's capacity and their tails hold whatever was there before; kernels read live
rows only. Without CUDA the same list of launches runs eagerly, which is how it is tested.

Knows nothing about requests, deadlines or why rows leave.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from offramp_kernels import (
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
from offramp_kernels.contract import Activation
from offramp_kernels.dispatch import Backend
from offramp_kernels.exits import GIVEN_UP, RULES
from offramp_model.encoder import Layer, Linear, Norm, PackedEncoder
from offramp_model.heads import Gate
from offramp_model.layer_loop import Abandoned, Leavers
from offramp_model.policies import ExitPolicy
from offramp_model.rows import RowSettings, TokenBatch

MAX_LENGTH = 128  # of the short attention kernel
FUSED: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What the linear kernel applies in its epilogue, by the name in `config.json`."""
POLL_SECONDS = 20e-6


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size of batch: what its buffers hold, and the exits after which rows are moved."""

    tokens: int
    rows: int
    max_length: int = MAX_LENGTH
    compact_after: frozenset[int] = field(default=frozenset())

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= min(self.tokens, 4096):
            raise ValueError(
                f"a bucket holds 1 to {min(self.tokens, 4096)} rows in {self.tokens} tokens, "
                f"got {self.rows}"
            )
        if not 1 <= self.max_length <= MAX_LENGTH:
            raise ValueError(f"max_length must lie in [1, {MAX_LENGTH}], got {self.max_length}")

    def fits(self, batch: TokenBatch, longest: int) -> bool:
        return (
            batch.num_tokens <= self.tokens
            and batch.num_rows <= self.rows
            and longest <= self.max_length
        )


def not_covered(stack: PackedEncoder, activation: str) -> str | None:
    """Why the lane cannot run this encoder, or None if it can: then `layer_loop` is to run it."""
    config = stack.config
    width, heads = config.hidden_size, stack.layers[0].num_heads
    reasons = {
        f"activation {activation!r} has no fused form": activation not in FUSED,
        f"pooling {config.pooling!r} runs in torch": config.pooling
        not in ("cls", "mean", "mean_cls"),
        f"heads of {width // heads} instead of 32 or 64": width // heads not in (32, 64),
        f"{width} wide, more than 1024": width > 1024,
        f"{config.num_labels} labels, more than 256": config.num_labels > 256,
        "its exits say sets of labels, and the kernels know one label a text": (
            config.is_multi_label
        ),
        "signals have a temperature": config.policies.temperature != 1.0,
        "the embeddings are projected": stack.embeddings.projection is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class DeviceLane:
    """Runs batches of at most its largest bucket, one at a time.

    Args:
        stack: the encoder, in the dtype that is to run, on its device.
        activation: its name in the backbone's `config.json`.
        policy: the exit rule of all rows; thresholds and layer bounds are each row's own.
        buckets: sizes of batches; each has its buffers and, on CUDA, its graph.
        backend: of the kernels; see `offramp_kernels`.

    Raises:
        ValueError: the encoder is not one that the lane covers (`not_covered`), or the policy is
            none of the kernels' rules.
    """

    def __init__(
        self,
        stack: PackedEncoder,
        activation: str,
        policy: ExitPolicy,
        buckets: Sequence[Bucket],
        *,
        backend: Backend = "auto",
    ) -> None:
        if reason := not_covered(stack, activation):
            raise ValueError(f"the device lane does not cover this encoder: {reason}")
        if policy.name not in RULES:
            raise ValueError(f"no rule {policy.name!r} in the kernels; known: {', '.join(RULES)}")
        if policy.name == "gate" and not stack.config.has_gates:
            raise ValueError("exit policy 'gate' needs gates, and this model has none")
        self._stack, self._rule = stack, RULES.index(policy.name)
        self._activation, self._backend = FUSED[activation], backend
        self._specs = exit_specs(stack)
        # The largest first: smaller graphs then find room in its memory.
        sizes = sorted(buckets, key=lambda bucket: bucket.tokens, reverse=True)
        pool = None
        self._passes: list[_Pass] = []
        for bucket in sizes:
            one = _Pass(self, bucket)
            pool = one.capture(pool)
            self._passes.insert(0, one)

    def covers(self, batch: TokenBatch) -> bool:
        """Is there a bucket that this batch fits?"""
        return self._pass_for(batch) is not None

    @torch.inference_mode()
    def __call__(
        self, batch: TokenBatch, settings: RowSettings, *, abandoned: Abandoned | None = None
    ) -> Iterator[Leavers]:
        """What `layer_loop` yields for the same batch (on the CPU) and settings, exit by exit.

        Rows that `abandoned` gives up stop at the next exit and are not yielded; `rows_run` counts
        those that were not known to be given up when the exit was handed on.

        Raises:
            ValueError: the batch fits no bucket.
        """
        chosen = self._pass_for(batch)
        if chosen is None:
            raise ValueError(
                f"no bucket for {batch.num_rows} rows of {batch.num_tokens} tokens; "
                f"they hold: {', '.join(str(one.bucket) for one in self._passes)}"
            )
        chosen.load(batch, settings.at(batch.order), self._rule)
        chosen.give_up(
            torch.from_numpy(batch.order), torch.ones(batch.num_rows, dtype=torch.bool), abandoned
        )
        chosen.start()
        yield from chosen.leavers(batch, abandoned)

    def _pass_for(self, batch: TokenBatch) -> "_Pass | None":
        longest = int(np.diff(batch.cu_seqlens).max()) if batch.num_rows else 0
        return next((one for one in self._passes if one.bucket.fits(batch, longest)), None)


class _Pass:
    """The buffers of one bucket, the launches over them, and the answers' way to the host."""

    def __init__(self, lane: DeviceLane, bucket: Bucket) -> None:
        stack, config = lane._stack, lane._stack.config
        self.bucket, self._lane, self._stack = bucket, lane, stack
        words = stack.embeddings.words
        device, dtype = words.device, words.dtype
        self._cuda = device.type == "cuda"
        tokens, rows, width = bucket.tokens, bucket.rows, config.hidden_size

        def room(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._ids, self._types, self._positions = (
            room(tokens, dtype=torch.int64) for _ in range(3)
        )
        self._cu_seqlens = room(rows + 1, dtype=torch.int32)
        self._counts = room(2, dtype=torch.int32)
        self._table = SlotTable.empty(rows, config.num_labels, device)
        self._lines = torch.arange(rows, dtype=torch.int32, device=device)
        self._slots = [torch.empty_like(self._lines) for _ in range(2)]
        self._hidden = [room(tokens, width) for _ in range(2)]
        self._qkv, self._context = room(tokens, 3 * width), room(tokens, width)
        self._inner = room(tokens, stack.layers[0].ffn_in.weight.shape[0])
        self._places = torch.arange(1, config.num_exits + 1, dtype=torch.int32, device=device)
        self._keep = room(rows, dtype=torch.bool)
        # On the host, in memory that the device copies to and from on its own.
        table = self._table
        self._host = {
            name: torch.empty_like(getattr(table, name), device="cpu", pin_memory=self._cuda)
            for name in ("exit_layer", "label", "signal", "by_policy", "logits")
        }
        self._cancelled = torch.zeros(rows, dtype=torch.int32, pin_memory=self._cuda)
        self._progress = torch.zeros(1, dtype=torch.int32, pin_memory=self._cuda)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._side = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event() if self._cuda else None  # type: ignore[no-untyped-call]

    # ---- before a pass ---------------------------------------------------------------------------

    def capture(self, pool: Any) -> Any:
        """Record the launches; what they allocate comes from `pool`, which is returned."""
        if not self._cuda:
            return None
        warm_up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up), torch.inference_mode():
            self._launch()  # kernels are compiled before they are captured
        torch.cuda.current_stream().wait_stream(warm_up)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may compute on the device meanwhile; only what this one does is recorded.
        recording = torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local")
        with torch.inference_mode(), recording:
            self._launch()
        return self._graph.pool()

    def load(self, batch: TokenBatch, settings: RowSettings, rule: int) -> None:
        """Put a batch in; its settings are in packed order."""
        if self._end is not None:  # a pass that nobody waited for still writes to the host
            self._end.synchronize()
        rows, tokens = batch.num_rows, batch.num_tokens
        for buffer, values in (
            (self._ids, batch.input_ids),
            (self._types, batch.type_ids),
            (self._positions, batch.positions),
        ):
            buffer[:tokens].copy_(torch.from_numpy(values), non_blocking=True)
        self._cu_seqlens[: rows + 1].copy_(torch.from_numpy(batch.cu_seqlens), non_blocking=True)
        self._cu_seqlens[rows + 1 :] = tokens  # the tail reads as empty texts
        self._counts.copy_(torch.tensor([rows, tokens], dtype=torch.int32))
        table = self._table
        table.rule.fill_(rule)
        table.threshold[:rows].copy_(torch.from_numpy(settings.threshold))
        table.min_layer[:rows].copy_(torch.from_numpy(settings.min_layer))
        table.max_layer[:rows].copy_(torch.from_numpy(settings.max_layer))
        self._cancelled.zero_()
        self._progress.zero_()

    def start(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._launch()
        if self._end is not None:
            self._end.record()

    # ---- the pass: launches only, nothing here waits -------------------------------------------

    def _launch(self) -> None:
        self._table.reset()
        hidden, spare = self._hidden
        self._embed(hidden)
        cu_seqlens, counts, slots = self._cu_seqlens, self._counts, self._lines
        source, slots_out = None, None
        spare_slots = list(self._slots)
        for place, (exit_layer, spec) in enumerate(self._lane._specs.items()):
            for index in self._stack.config.segment(exit_layer):
                self._layer(self._stack.layers[index], hidden, spare, cu_seqlens, counts)
            self._table.cancelled.copy_(self._cancelled, non_blocking=True)
            keep = exit_head(
                hidden,
                cu_seqlens,
                counts,
                slots,
                spec,
                self._table,
                source=source,
                slots_out=slots_out,
                out=self._keep,
                backend=self._lane._backend,
            )
            self._send(place)
            if slots_out is not None:
                slots, source, slots_out = slots_out, None, None
            if exit_layer in self.bucket.compact_after and not spec.is_last:
                plan = compact_plan(keep, cu_seqlens, backend=self._lane._backend)
                gather_rows(hidden, cu_seqlens, plan, out=spare, backend=self._lane._backend)
                hidden, spare = spare, hidden
                cu_seqlens, counts, source = plan.cu_seqlens, plan.counts, plan.source
                slots_out = spare_slots.pop()
                spare_slots.insert(0, slots_out)
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def _embed(self, out: Tensor) -> None:
        embeddings = self._stack.embeddings
        x = F.embedding(self._ids, embeddings.words)
        x += F.embedding(self._positions + embeddings.first_position, embeddings.positions)
        if embeddings.types is not None:
            types = self._types.clamp(max=embeddings.types.shape[0] - 1)
            x += F.embedding(types, embeddings.types)
        self._norm(embeddings.norm, x, self._counts, out)

    def _layer(
        self, layer: Layer, x: Tensor, scratch: Tensor, cu_seqlens: Tensor, counts: Tensor
    ) -> None:
        """One layer over the live rows of `x`, in place; `scratch` is like `x`."""
        self._linear(layer.qkv, x, counts, self._qkv)
        varlen_attn(
            *(self._qkv, cu_seqlens, layer.num_heads, self.bucket.max_length),
            counts=counts,
            out=self._context,
            backend=self._lane._backend,
        )
        self._linear(layer.attention_out, self._context, counts, scratch, residual=x)
        self._norm(layer.attention_norm, scratch, counts, x)
        activation = self._lane._activation
        self._linear(layer.ffn_in, x, counts, self._inner, activation=activation)
        self._linear(layer.ffn_out, self._inner, counts, scratch, residual=x)
        self._norm(layer.ffn_norm, scratch, counts, x)

    def _linear(
        self,
        one: Linear,
        x: Tensor,
        counts: Tensor,
        out: Tensor,
        *,
        activation: Activation = "none",
        residual: Tensor | None = None,
    ) -> None:
        linear(
            *(x, one.weight, one.bias),
            activation=activation,
            residual=residual,
            counts=counts,
            out=out,
            backend=self._lane._backend,
        )

    def _norm(self, norm: Norm, x: Tensor, counts: Tensor, out: Tensor) -> None:
        add_layernorm(
            *(x, norm.weight, norm.bias),
            eps=norm.eps,
            counts=counts,
            out=out,
            backend=self._lane._backend,
        )

    def _send(self, place: int) -> None:
        """Copy the answers so far to the host, beside the layers to come, and then say so.

        The next exit may latch more while the copies run: the host looks only at rows that left at
        this exit, and these are never written again.
        """
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self._copy(place)
        else:
            self._copy(place)

    def _copy(self, place: int) -> None:
        for name, target in self._host.items():
            target.copy_(getattr(self._table, name), non_blocking=True)
        self._progress.copy_(self._places[place : place + 1], non_blocking=True)

    # ---- the host's side -------------------------------------------------------------------------

    def leavers(self, batch: TokenBatch, abandoned: Abandoned | None) -> Iterator[Leavers]:
        rows, host = batch.num_rows, self._host
        order = torch.from_numpy(batch.order)
        inside = torch.ones(rows, dtype=torch.bool)
        for place, exit_layer in enumerate(self._lane._specs):
            self.give_up(order, inside, abandoned)
            if not inside.any():
                return
            self._wait(place, order, inside, abandoned)
            layers = host["exit_layer"][:rows].clone()
            inside &= layers != GIVEN_UP
            rows_run = int(inside.sum())
            index = (inside & (layers == exit_layer)).nonzero().squeeze(-1)
            inside[index] = False
            yield Leavers(
                exit_layer=exit_layer,
                row=order[index],
                label=host["label"][index].long(),
                logits=host["logits"][index],
                signal=host["signal"][index],
                by_policy=host["by_policy"][index],
                rows_run=rows_run,
            )

    def _wait(self, place: int, order: Tensor, inside: Tensor, abandoned: Abandoned | None) -> None:
        """Until the answers of this exit have landed. Reads host memory only."""
        while int(self._progress) <= place:
            self.give_up(order, inside, abandoned)
            time.sleep(POLL_SECONDS)

    def give_up(self, order: Tensor, inside: Tensor, abandoned: Abandoned | None) -> None:
        if abandoned is None:
            return
        index = inside.nonzero().squeeze(-1)
        self._cancelled[index] = abandoned(order[index]).int()


def exit_specs(stack: PackedEncoder) -> dict[int, ExitSpec]:
    """The heads of a stack as the kernels take them, by exit layer."""
    config, heads = stack.config, stack.heads
    pooling: Literal["cls", "mean", "mean_cls"] = config.pooling  # type: ignore[assignment]
    specs = {}
    for index, exit_layer in enumerate(config.exit_layers):
        pooler = heads.poolers[min(index, len(heads.poolers) - 1)] if heads.poolers else None
        gate = heads.gates[index] if index < len(heads.gates) else None
        specs[exit_layer] = ExitSpec(
            classifier=_dense(heads.classifiers[index]),
            exit_layer=exit_layer,
            exit_number=index + 1,
            is_last=exit_layer == config.num_layers,
            pooling=pooling,
            pooler=None if pooler is None else _dense(pooler),
            gate=None if gate is None else _gate(gate),
            vote_exponent=config.policies.vote_exponent,
            vote_fallback=config.policies.vote_fallback,
        )
    return specs


def _dense(module: object) -> Dense:
    assert isinstance(module, torch.nn.Linear)
    return Dense(module.weight.detach(), module.bias.detach())


def _gate(module: object) -> GateWeights:
    assert isinstance(module, Gate)
    hidden = None if module.hidden is None else _dense(module.hidden)
    return GateWeights(out=_dense(module.out), hidden=hidden)
