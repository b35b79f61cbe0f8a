"""Plain-torch twin of the exit head: pool, classify, decide and latch at one exit.

Written like the model's policies and signals, but per row of a slot table with a rule for each.
Knows nothing about Triton. On CUDA it waits for the host, to learn how many rows are alive.
"""

import math

import torch
from torch import Tensor

from offramp_kernels.contract import check_exit_inputs
from offramp_kernels.exits import ALIVE, BALLOT_UNIT, GIVEN_UP, RULES, Dense, ExitSpec, SlotTable


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
    """Let every live row leave or stay at one exit; latch the answers of those who leave."""
    check_exit_inputs(hidden, cu_seqlens, counts, slots, spec, table, source, slots_out, out)
    rows = slots.shape[0]
    keep = torch.empty_like(slots, dtype=torch.bool) if out is None else out
    keep.zero_()
    n_alive = min(int(counts[0]), rows)  # synchronises on CUDA
    line = slots[:n_alive].long()
    if source is not None:
        place = source[:n_alive].long()
        line = torch.where(place >= 0, slots[place.clamp(min=0)].long(), -1)
    if slots_out is not None:
        slots_out.fill_(-1)
        slots_out[:n_alive] = line.int()

    row = (line >= 0).nonzero().squeeze(1)
    row = row[table.exit_layer[line[row]] == ALIVE]
    given_up = table.cancelled[line[row]] != 0
    table.exit_layer[line[row[given_up]]] = GIVEN_UP
    row = row[~given_up]
    line = line[row]  # (n,), of the live rows
    if row.numel() == 0:
        return keep

    state = pool(hidden, cu_seqlens, row, spec)
    if spec.pooler is not None:
        state = torch.tanh(_linear(state, spec.pooler))
    logits = _linear(state, spec.classifier)  # (n, C)
    leaving = _decide(logits, _gate_signal(state, spec), line, spec, table)
    keep[row] = ~leaving
    return keep


def pool(hidden: Tensor, cu_seqlens: Tensor, row: Tensor, spec: ExitSpec) -> Tensor:
    """fp32 [n, P]: the given rows' texts, pooled; without tokens, zeros."""
    start, stop = cu_seqlens[row].tolist(), cu_seqlens[row + 1].tolist()
    nothing = hidden.new_zeros((1, hidden.shape[1]), dtype=torch.float32)
    texts = [hidden[a:b].float() if b > a else nothing for a, b in zip(start, stop, strict=True)]
    parts = []
    if spec.pooling != "cls":
        parts.append(torch.stack([text.mean(dim=0) for text in texts]))
    if spec.pooling != "mean":
        parts.append(torch.stack([text[0] for text in texts]))
    return torch.cat(parts, dim=1)


def _linear(x: Tensor, dense: Dense) -> Tensor:
    return torch.nn.functional.linear(x, dense.weight, dense.bias)


def _gate_signal(state: Tensor, spec: ExitSpec) -> Tensor:
    if spec.is_last:
        return state.new_ones(len(state))
    if spec.gate is None:
        return state.new_full((len(state),), torch.nan)
    if spec.gate.hidden is not None:
        state = torch.nn.functional.gelu(_linear(state, spec.gate.hidden))
    return torch.sigmoid(_linear(state, spec.gate.out).squeeze(1))


def _decide(logits: Tensor, gate: Tensor, line: Tensor, spec: ExitSpec, table: SlotTable) -> Tensor:
    """Which of these live rows leave, bool [n]; brings the table up to date."""
    own = logits.argmax(dim=1)  # of NaNs the first, of equals the first
    broken = logits.isnan().any(dim=1)
    probabilities = torch.softmax(logits, dim=1)
    top = probabilities.topk(2, dim=1).values
    log_p = torch.log_softmax(logits, dim=1)
    rule = table.rule[line]
    is_rule = {name: rule == number for number, name in enumerate(RULES)}

    signal = top[:, 0]
    for name, other in (
        ("margin", top[:, 0] - top[:, 1]),
        ("entropy", -(log_p.exp() * log_p).sum(dim=1) / math.log(spec.num_labels)),
        ("energy", torch.sigmoid(-torch.logsumexp(logits, dim=1))),
        ("patience", _agreeing(own, broken, line, is_rule["patience"], table)),
        ("gate", gate),
    ):
        signal = torch.where(is_rule[name], other, signal)
    signal = torch.where(broken, torch.nan, signal)
    most, winner, latest = _vote(own, broken, line, is_rule["vote"], spec, table)
    votes = torch.where(is_rule["vote"], most, 0)  # other rows have no ballots of their own
    wide = torch.where(is_rule["vote"], spec.vote_signals[votes], signal.double())
    wide = torch.where(broken, torch.nan, wide)
    wide = torch.where(is_rule["fixed_layer"], float(spec.exit_layer), wide)

    # In the signal's own dtype, as the policies compare.
    threshold = table.threshold[line]
    limit = threshold.float()
    sure = signal > limit
    sure = torch.where(is_rule["entropy"] | is_rule["energy"], signal < limit, sure)
    sure = torch.where(is_rule["patience"], signal >= limit, sure)
    sure = torch.where(is_rule["vote"] | is_rule["fixed_layer"], wide >= threshold, sure)
    sure = sure & ~is_rule["full_depth"]
    at_end = latest if spec.vote_fallback == "majority" else own
    label = torch.where(is_rule["vote"], torch.where(sure, winner, at_end), own)

    sure = sure & (spec.exit_layer >= table.min_layer[line])
    leaving = sure | (spec.exit_layer >= table.max_layer[line])
    if spec.is_last:
        leaving = torch.ones_like(leaving)
    left = line[leaving]
    table.label[left] = label[leaving].int()
    table.signal[left] = wide[leaving]
    table.by_policy[left] = sure[leaving]
    table.logits[left] = logits[leaving]
    table.exit_layer[left] = spec.exit_layer
    return leaving


def _agreeing(
    own: Tensor, broken: Tensor, line: Tensor, patient: Tensor, table: SlotTable
) -> Tensor:
    """Exits in a row that agreed, fp32 [n]; remembers for the patient rows."""
    agrees = (own == table.last_label[line]) & ~broken
    agreeing = torch.where(agrees, table.agreeing[line] + 1, 0)
    table.last_label[line[patient]] = torch.where(broken, -1, own)[patient].int()
    table.agreeing[line[patient]] = agreeing[patient]
    return agreeing.float()


def _vote(
    own: Tensor, broken: Tensor, line: Tensor, voting: Tensor, spec: ExitSpec, table: SlotTable
) -> tuple[Tensor, Tensor, Tensor]:
    """Votes of the most voted class, the winner, the most voted class that was voted for last,
    each [n]; remembers for the voting rows."""
    ballots = table.ballots[line]
    one_more = (ballots // BALLOT_UNIT + 1) * BALLOT_UNIT + spec.exit_number
    elected = torch.nn.functional.one_hot(own, spec.num_labels).bool() & ~broken[:, None]
    ballots = torch.where(elected, one_more, ballots)
    table.ballots[line[voting]] = ballots[voting]
    votes = ballots // BALLOT_UNIT
    most = votes.amax(dim=1)
    own_wins = votes.gather(1, own[:, None]).squeeze(1) == most
    return most, torch.where(own_wins, own, votes.argmax(dim=1)), ballots.argmax(dim=1)
