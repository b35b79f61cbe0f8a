"""Exit head on the GPU: pool, classify, decide and latch the answers of one exit in one launch.

Knows nothing about the encoder, or about how the rows that stay are moved together (that is the
plan). Importing this file imports Triton; ``dispatch`` does so on first use.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offramp_kernels.contract import check_exit_inputs
from offramp_kernels.exits import ALIVE, BALLOT_UNIT, GIVEN_UP, RULES, ExitSpec, SlotTable
from offramp_kernels.launch import check_aligned, check_launch_device

FULL_DEPTH = tl.constexpr(RULES.index("full_depth"))
FIXED_LAYER = tl.constexpr(RULES.index("fixed_layer"))
MARGIN = tl.constexpr(RULES.index("margin"))
ENTROPY = tl.constexpr(RULES.index("entropy"))
ENERGY = tl.constexpr(RULES.index("energy"))
PATIENCE = tl.constexpr(RULES.index("patience"))
VOTE = tl.constexpr(RULES.index("vote"))
GATE = tl.constexpr(RULES.index("gate"))
_ALIVE = tl.constexpr(ALIVE)
_GIVEN_UP = tl.constexpr(GIVEN_UP)
_BALLOT_UNIT = tl.constexpr(BALLOT_UNIT)


@dataclass(frozen=True, slots=True)
class HeadConfig:
    block_rows: int
    block_tokens: int
    block_columns: int
    num_warps: int
    max_registers: int  # said, or ptxas spills a word or two for the sake of occupancy


# Few classes and no pooler: a program per row, since there is next to nothing to share and a mean
# over tokens wants all SMs. Else 16 rows share each weight that is read, and use tensor cores.
ROW_CONFIG = HeadConfig(1, block_tokens=16, block_columns=128, num_warps=4, max_registers=128)
TILE_CONFIG = HeadConfig(16, block_tokens=4, block_columns=32, num_warps=8, max_registers=255)
ROW_CONFIG_CLASSES = 32
POOLER_SLICE = 32
"""Outputs of the pooler that are on chip at a time."""


@triton.jit
def _pool(
    hidden_ptr, start, length, column, WIDTH: tl.constexpr, MEAN: tl.constexpr, TOKENS: tl.constexpr
):
    """fp32 [R, K]: the first token of each row, or the mean of its tokens, some columns of it.
    A row of no tokens gives zeros and reads nothing."""
    in_width = column < WIDTH
    if MEAN:
        total = tl.zeros([start.shape[0], column.shape[0]], tl.float32)
        for first in range(0, tl.max(length, 0), TOKENS):
            token = first + tl.arange(0, TOKENS)
            mask = (token[None, :] < length[:, None])[:, :, None] & in_width[None, None, :]
            address = (start[:, None] + token[None, :]).to(tl.int64)[:, :, None] * WIDTH
            values = tl.load(hidden_ptr + address + column[None, None, :], mask=mask, other=0.0)
            total += tl.sum(values.to(tl.float32), 1)
        pooled = tl.div_rn(total, tl.maximum(length, 1).to(tl.float32)[:, None])
    else:
        mask = (length > 0)[:, None] & in_width[None, :]
        address = start.to(tl.int64)[:, None] * WIDTH + column[None, :]
        pooled = tl.load(hidden_ptr + address, mask=mask, other=0.0).to(tl.float32)
    return pooled


@triton.jit
def _product(x, weight_ptr, output, n_outputs, column, in_width, STRIDE: tl.constexpr):
    """x [R, K] times the transposed weight [N, K], read at rows ``output`` and some columns."""
    mask = (output < n_outputs)[:, None] & in_width[None, :]
    address = output.to(tl.int64)[:, None] * STRIDE + column[None, :]
    weight = tl.load(weight_ptr + address, mask=mask, other=0.0)
    if x.shape[0] >= 16:
        # Three TF32 products: the accuracy of fp32 on tensor cores (one would be off by 3e-4).
        product = tl.dot(x, tl.trans(weight), input_precision="tf32x3")
    else:
        product = tl.sum(x[:, None, :] * weight[None, :, :], 2)
    return product


@triton.jit
def _add_state(
    logits, gate, state, classifier_ptr, gate_ptr, label, inner, column, in_width,
    STATE: tl.constexpr, N_LABELS: tl.constexpr, GATE_SIZE: tl.constexpr,
):  # fmt: skip
    """Some columns of the state, [R, K], go into the sums of the classifier and of the gate."""
    logits += _product(state, classifier_ptr, label, N_LABELS, column, in_width, STATE)
    if gate_ptr is not None:
        gate += _product(state, gate_ptr, inner, GATE_SIZE, column, in_width, STATE)
    return logits, gate


@triton.jit
def _sigmoid(x):
    """Without overflow on either side."""
    small = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0, 1.0, small), 1.0 + small)


@triton.jit(do_not_specialize=["n_rows", "exit_layer", "exit_number", "is_last"])
def exit_head_kernel(
    hidden_ptr,  # [T, WIDTH]
    cu_seqlens_ptr,  # int32 [n_rows + 1]
    counts_ptr,  # int32 [2]: n_alive, T_alive
    slots_ptr,  # int32 [n_rows]: slot of each row, or of each row before the last move
    source_ptr,  # int32 [n_rows] or None: the last plan's
    slots_out_ptr,  # int32 [n_rows] or None: slot of each row now, out
    keep_ptr,  # bool [n_rows], out
    pooled_ptr,  # fp32 [n_rows, POOLED] scratch if there is a pooler, else None
    pooler_weight_ptr,  # [STATE, POOLED] or None
    pooler_bias_ptr,  # [STATE] or None
    classifier_weight_ptr,  # [N_LABELS, STATE]
    classifier_bias_ptr,  # [N_LABELS]
    gate_weight_ptr,  # [GATE_SIZE, STATE] or None
    gate_bias_ptr,  # [GATE_SIZE] or None
    gate_out_weight_ptr,  # [GATE_SIZE], or None for a linear gate
    gate_out_bias_ptr,  # [1], or None for a linear gate
    vote_signals_ptr,  # fp64 [exit_number + 1]
    rule_ptr,  # the slot table, column by column; all [S] but ballots and logits, [S, N_LABELS]
    threshold_ptr,
    min_layer_ptr,
    max_layer_ptr,
    cancelled_ptr,
    last_label_ptr,
    agreeing_ptr,
    ballots_ptr,
    exit_layer_ptr,
    label_ptr,
    signal_ptr,
    by_policy_ptr,
    logits_ptr,
    n_rows,
    exit_layer,
    exit_number,
    is_last,
    LOG_LABELS: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    CLS: tl.constexpr,
    POOLED: tl.constexpr,
    STATE: tl.constexpr,
    N_LABELS: tl.constexpr,
    GATE_SIZE: tl.constexpr,
    MAJORITY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_LABELS: tl.constexpr,
    BLOCK_GATE: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    """With z the logits, m = max z, s = sum exp(z - m), C classes, l exits so far:

    confidence 1/s, margin (1 - exp(z2 - m))/s, entropy -sum(p log p)/log C with log p = z - m -
    log s, energy sigmoid(-(m + log s)), patience: exits that agreed, vote: most votes / l^p,
    gate: sigmoid of the gate. What is computed is the condition to *leave*; every comparison with
    NaN is false, so a row of NaN logits stays, until the last exit.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    in_batch = row < n_rows
    n_alive = tl.load(counts_ptr)
    if first_row >= n_alive:  # nobody here: say so and leave
        tl.store(keep_ptr + row, tl.zeros([BLOCK_ROWS], tl.int1), mask=in_batch)
        if slots_out_ptr is not None:
            tl.store(slots_out_ptr + row, -1, mask=in_batch)
        return

    # Who is in this row, and does anybody still wait for it?
    carried = in_batch & (row < n_alive)
    place = row
    if source_ptr is not None:
        place = tl.load(source_ptr + row, mask=carried, other=-1)
        carried = carried & (place >= 0)
    slot = tl.load(slots_ptr + place, mask=carried, other=-1)
    if slots_out_ptr is not None:
        tl.store(slots_out_ptr + row, slot, mask=in_batch)
    carried = carried & (slot >= 0)
    alive = carried & (tl.load(exit_layer_ptr + slot, mask=carried, other=_GIVEN_UP) == _ALIVE)
    given_up = alive & (tl.load(cancelled_ptr + slot, mask=alive, other=0) != 0)
    tl.store(exit_layer_ptr + slot, _GIVEN_UP, mask=given_up)
    alive = alive & ~given_up
    rule = tl.load(rule_ptr + slot, mask=alive, other=FULL_DEPTH)

    # The state, a few columns at a time, and what the classifier and the gate make of it.
    start = tl.load(cu_seqlens_ptr + row, mask=alive, other=0)
    length = tl.load(cu_seqlens_ptr + row + 1, mask=alive, other=0) - start
    label = tl.arange(0, BLOCK_LABELS)
    inner = tl.arange(0, BLOCK_GATE)
    logits = tl.zeros([BLOCK_ROWS, BLOCK_LABELS], tl.float32)
    gate = tl.zeros([BLOCK_ROWS, BLOCK_GATE], tl.float32)
    if pooled_ptr is None:
        if MEAN:
            for first in range(0, WIDTH, BLOCK_COLUMNS):
                column = first + tl.arange(0, BLOCK_COLUMNS)
                state = _pool(hidden_ptr, start, length, column, WIDTH, True, BLOCK_TOKENS)
                logits, gate = _add_state(
                    logits, gate, state, classifier_weight_ptr, gate_weight_ptr,
                    label, inner, column, column < WIDTH, STATE, N_LABELS, GATE_SIZE,
                )  # fmt: skip
        if CLS:
            for first in range(0, WIDTH, BLOCK_COLUMNS):
                column = first + tl.arange(0, BLOCK_COLUMNS)
                state = _pool(hidden_ptr, start, length, column, WIDTH, False, BLOCK_TOKENS)
                logits, gate = _add_state(
                    logits, gate, state, classifier_weight_ptr, gate_weight_ptr,
                    label, inner, column + (POOLED - WIDTH), column < WIDTH,
                    STATE, N_LABELS, GATE_SIZE,
                )  # fmt: skip
    else:
        pooled_row = row.to(tl.int64)[:, None] * POOLED
        for first in range(0, WIDTH, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            mask = in_batch[:, None] & (column < WIDTH)[None, :]
            if MEAN:
                pooled = _pool(hidden_ptr, start, length, column, WIDTH, True, BLOCK_TOKENS)
                tl.store(pooled_ptr + pooled_row + column[None, :], pooled, mask=mask)
            if CLS:
                pooled = _pool(hidden_ptr, start, length, column, WIDTH, False, BLOCK_TOKENS)
                at = column + (POOLED - WIDTH)
                tl.store(pooled_ptr + pooled_row + at[None, :], pooled, mask=mask)
        tl.debug_barrier()  # other threads of this program read what was just stored
        for first_state in range(0, STATE, BLOCK_STATE):
            column = first_state + tl.arange(0, BLOCK_STATE)
            dense = tl.zeros([BLOCK_ROWS, BLOCK_STATE], tl.float32)
            for first in range(0, POOLED, BLOCK_COLUMNS):
                feature = first + tl.arange(0, BLOCK_COLUMNS)
                mask = in_batch[:, None] & (feature < POOLED)[None, :]
                pooled = tl.load(pooled_ptr + pooled_row + feature[None, :], mask=mask, other=0.0)
                dense += _product(
                    pooled, pooler_weight_ptr, column, STATE, feature, feature < POOLED, POOLED
                )
            dense += tl.load(pooler_bias_ptr + column, mask=column < STATE, other=0.0)[None, :]
            state = 2.0 * _sigmoid(2.0 * dense) - 1.0  # tanh: libdevice cannot be interpreted
            logits, gate = _add_state(
                logits, gate, state, classifier_weight_ptr, gate_weight_ptr,
                label, inner, column, column < STATE, STATE, N_LABELS, GATE_SIZE,
            )  # fmt: skip
    is_label = label < N_LABELS
    logits += tl.load(classifier_bias_ptr + label, mask=is_label, other=0.0)[None, :]

    # Softmax statistics. tl.max passes over NaN, hence the separate search for it; like torch's
    # arg-max, the label of a row with NaN is the first NaN, and of equals the first.
    z = tl.where(is_label[None, :], logits, -float("inf"))
    is_nan = z != z
    broken = tl.sum(is_nan.to(tl.int32), 1) > 0
    highest = tl.max(z, 1)
    is_highest = tl.where(broken[:, None], is_nan, z == highest[:, None])
    own = tl.min(tl.where(is_highest, label[None, :], BLOCK_LABELS), 1)
    shifted = z - highest[:, None]
    total = tl.sum(tl.exp(shifted), 1)
    log_total = tl.log(total)
    runner_up = tl.max(tl.where(label[None, :] == own[:, None], -float("inf"), z), 1)
    confidence = tl.div_rn(1.0, total)
    margin = confidence - tl.div_rn(tl.exp(runner_up - highest), total)
    log_p = tl.where(is_label[None, :], shifted - log_total[:, None], 0.0)  # else 0 * -inf
    entropy = tl.div_rn(-tl.sum(tl.exp(log_p) * log_p, 1), LOG_LABELS)
    finite = tl.abs(highest) < float("inf")
    energy = _sigmoid(-tl.where(finite, highest + log_total, highest))

    # The gate: sure at the last exit, never without weights.
    if gate_weight_ptr is None:
        gate_logit = tl.full([BLOCK_ROWS], float("nan"), tl.float32)
    else:
        is_inner = inner < GATE_SIZE
        gate += tl.load(gate_bias_ptr + inner, mask=is_inner, other=0.0)[None, :]
        if gate_out_weight_ptr is None:
            gate_logit = tl.sum(tl.where(is_inner[None, :], gate, 0.0), 1)
        else:
            gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
            out_weight = tl.load(gate_out_weight_ptr + inner, mask=is_inner, other=0.0)
            gate_logit = tl.sum(gate * out_weight[None, :], 1) + tl.load(gate_out_bias_ptr)
    ends_here = tl.zeros([BLOCK_ROWS], tl.int32) + is_last > 0  # the interpreter splats no flag
    gate_signal = tl.where(ends_here, 1.0, _sigmoid(gate_logit))

    # Patience and votes remember. Their memory is written for the rows that follow these rules.
    patient = alive & (rule == PATIENCE)
    agrees = (tl.load(last_label_ptr + slot, mask=patient, other=-1) == own) & ~broken
    agreeing = tl.load(agreeing_ptr + slot, mask=patient, other=0)
    agreeing = tl.where(agrees, agreeing + 1, 0)
    tl.store(last_label_ptr + slot, tl.where(broken, -1, own), mask=patient)
    tl.store(agreeing_ptr + slot, agreeing, mask=patient)

    line = slot.to(tl.int64)[:, None] * N_LABELS + label[None, :]
    voting = alive & (rule == VOTE)
    votes_here = voting[:, None] & is_label[None, :]
    ballots = tl.load(ballots_ptr + line, mask=votes_here, other=-1)
    elected = (label[None, :] == own[:, None]) & ~broken[:, None]
    one_more = (ballots // _BALLOT_UNIT + 1) * _BALLOT_UNIT + exit_number
    ballots = tl.where(votes_here & elected, one_more, ballots)
    tl.store(ballots_ptr + line, ballots, mask=votes_here)
    best = tl.max(ballots, 1)
    most = best // _BALLOT_UNIT
    is_most = votes_here & (ballots >= (most * _BALLOT_UNIT)[:, None])
    first_most = tl.min(tl.where(is_most, label[None, :], BLOCK_LABELS), 1)
    own_wins = tl.sum((is_most & (label[None, :] == own[:, None])).to(tl.int32), 1) > 0
    winner = tl.where(own_wins, own, first_most)
    at_end = own
    if MAJORITY:
        at_end = tl.min(tl.where(ballots == best[:, None], label[None, :], BLOCK_LABELS), 1)
    possible = voting & (most <= exit_number)  # or the table was not reset
    vote_signal = tl.load(vote_signals_ptr + most, mask=possible, other=0.0)

    # Compare in the signal's own dtype, as the policies do.
    signal = tl.where(rule == MARGIN, margin, confidence)
    signal = tl.where(rule == ENTROPY, entropy, signal)
    signal = tl.where(rule == ENERGY, energy, signal)
    signal = tl.where(rule == PATIENCE, agreeing.to(tl.float32), signal)
    signal = tl.where(rule == GATE, gate_signal, signal)
    signal = tl.where(broken, float("nan"), signal)
    wide = tl.where(rule == VOTE, vote_signal, signal.to(tl.float64))
    wide = tl.where(broken, float("nan"), wide)
    wide = tl.where(rule == FIXED_LAYER, exit_layer.to(tl.float64), wide)  # blind to the logits
    threshold = tl.load(threshold_ptr + slot, mask=alive, other=0.0)
    limit = threshold.to(tl.float32)
    is_wide = (rule == FIXED_LAYER) | (rule == VOTE)
    is_below = (rule == ENTROPY) | (rule == ENERGY)
    sure = tl.where(rule == PATIENCE, signal >= limit, signal > limit)
    sure = tl.where(is_below, signal < limit, sure)
    sure = tl.where(is_wide, wide >= threshold, sure) & (rule != FULL_DEPTH)
    vote_label = tl.where(sure, winner, at_end)
    answer = tl.where(rule == VOTE, vote_label, own)

    # Latch the answers of those who leave; the others go on.
    sure = sure & (exit_layer >= tl.load(min_layer_ptr + slot, mask=alive, other=0))
    forced = ends_here | (exit_layer >= tl.load(max_layer_ptr + slot, mask=alive, other=0))
    leaving = alive & (sure | forced)
    tl.store(keep_ptr + row, alive & ~leaving, mask=in_batch)
    tl.store(label_ptr + slot, answer, mask=leaving)
    tl.store(signal_ptr + slot, wide, mask=leaving)
    tl.store(by_policy_ptr + slot, sure, mask=leaving)
    tl.store(logits_ptr + line, logits, mask=leaving[:, None] & is_label[None, :])
    tl.store(exit_layer_ptr + slot, exit_layer, mask=leaving)


def exit_head(
    hidden: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    slots: Tensor,
    spec: ExitSpec,
    table: SlotTable,
    *,
    source: Tensor | None = None,
    slots_out: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Let every live row leave or stay at one exit; latch the answers of those who leave.

    hidden      [T, H], fp32, fp16 or bf16, contiguous, 16-byte aligned
    cu_seqlens  int32 [B + 1]; only the first n_alive texts are looked at
    counts      int32 [2], n_alive and T_alive, read on the device
    slots       int32 [B], in [-1, S): line of the table of each row, -1 for none; no line twice
    spec        the exit; see ExitSpec
    table       S lines, C classes; see SlotTable. Memory and answers are updated in place, only
                in the lines of live rows; an answer is never overwritten
    source      None, or a plan's: row j is then the one that was row source[j] when `slots` was
                written, i.e. its line is slots[source[j]]
    slots_out   None, or int32 [B], not `slots`: the line of each row now, -1 from n_alive on, for
                the exit after the next move
    out         None, or bool [B]
    all on the current CUDA device (or on the CPU when Triton interprets); inference only

    Returns keep, bool [B]: true where the row is alive and stays; false from n_alive on, for
    rows that left before, and for rows cancelled (their line's exit_layer becomes GIVEN_UP, and
    nothing else of it changes). One launch, no synchronisation; a new scratch buffer if the exit
    has a pooler. A breach of the contract raises ValueError.

    Logits are summed in fp32 (a pooler's and many classes' on tensor cores, three TF32 products).
    Signals follow the model's policies, fp32 and compared in fp32, votes and layers in fp64: equal
    up to the rounding of exp, log, erf and of sums; a row whose signal is within a few units in
    the last place of its threshold may decide otherwise than on another device.
    """
    check_exit_inputs(hidden, cu_seqlens, counts, slots, spec, table, source, slots_out, out)
    check_launch_device(exit_head_kernel, hidden.device)
    check_aligned("hidden", hidden)
    rows = slots.shape[0]
    keep = torch.empty_like(slots, dtype=torch.bool) if out is None else out
    if rows == 0:
        return keep
    config = head_config(spec)
    scratch = None
    if spec.pooler is not None:
        scratch = hidden.new_empty((rows, spec.pooled_size), dtype=torch.float32)
    # A linear gate is the first layer of the other kind, with one output and nothing behind it.
    gate = spec.gate
    first = None if gate is None else gate.hidden or gate.out
    second = None if gate is None or gate.hidden is None else gate.out
    gate_size = 0 if first is None else first.weight.shape[0]
    exit_head_kernel[(triton.cdiv(rows, config.block_rows),)](
        hidden,
        cu_seqlens,
        counts,
        slots,
        source,
        slots_out,
        keep,
        scratch,
        None if spec.pooler is None else spec.pooler.weight,
        None if spec.pooler is None else spec.pooler.bias,
        spec.classifier.weight,
        spec.classifier.bias,
        None if first is None else first.weight,
        None if first is None else first.bias,
        None if second is None else second.weight,
        None if second is None else second.bias,
        spec.vote_signals,
        table.rule,
        table.threshold,
        table.min_layer,
        table.max_layer,
        table.cancelled,
        table.last_label,
        table.agreeing,
        table.ballots,
        table.exit_layer,
        table.label,
        table.signal,
        table.by_policy,
        table.logits,
        rows,
        spec.exit_layer,
        spec.exit_number,
        int(spec.is_last),
        LOG_LABELS=math.log(spec.num_labels),
        WIDTH=spec.hidden_size,
        MEAN=spec.pooling != "cls",
        CLS=spec.pooling != "mean",
        POOLED=spec.pooled_size,
        STATE=spec.state_size,
        N_LABELS=spec.num_labels,
        GATE_SIZE=gate_size,
        MAJORITY=spec.vote_fallback == "majority",
        BLOCK_ROWS=config.block_rows,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_COLUMNS=config.block_columns,
        BLOCK_LABELS=block_of(spec.num_labels),
        BLOCK_GATE=block_of(gate_size),
        BLOCK_STATE=POOLER_SLICE,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        enable_fp_fusion=False,  # so that sums of products are those of the twin
    )
    return keep


def head_config(spec: ExitSpec) -> HeadConfig:
    row_by_row = spec.pooler is None and spec.num_labels <= ROW_CONFIG_CLASSES
    return ROW_CONFIG if row_by_row else TILE_CONFIG


def block_of(outputs: int) -> int:
    """Padded outputs of a small product: a power of two, 16 at least, which tensor cores demand."""
    return max(16, 1 << (outputs - 1).bit_length()) if outputs else 16


def bytes_moved(spec: ExitSpec, n_alive: int, t_alive: int, element_size: int) -> int:
    """What is pooled and every weight read once, answers written once; settings are noise."""
    tokens = n_alive if spec.pooling == "cls" else t_alive
    weights = _weight_count(spec)
    return tokens * spec.hidden_size * element_size + 4 * weights + 4 * n_alive * spec.num_labels


def flops(spec: ExitSpec, n_alive: int, t_alive: int) -> int:
    """Additions of the pooling and two operations per weight and row."""
    pooling = 0 if spec.pooling == "cls" else t_alive * spec.hidden_size
    return pooling + 2 * n_alive * _weight_count(spec)


def _weight_count(spec: ExitSpec) -> int:
    parts = [spec.classifier, spec.pooler]
    if spec.gate is not None:
        parts += [spec.gate.out, spec.gate.hidden]
    return sum(part.weight.numel() for part in parts if part is not None)
