"""The mechanics of L2W-DEN: a small network weighs every row's exit losses, and learns how by
looking one optimiser step ahead.

The step that is looked at (the pseudo-update) is linear in the gradient whatever the optimiser:
theta_hat = base - gain * gradient. The training loss is linear in the weights W. So the effect of a
weight on the loss after the step is one inner product,

    dL_meta / dW[i, k] = -(1 / n) * < gradient of l[i, k] at theta, gain * g_meta >,

with g_meta the gradient of L_meta at theta_hat. `meta_gradient` has it in two forms: "central"
takes all inner products at once from two forwards, at theta moved a little along gain * g_meta and
against it; "exact" differentiates twice. Tests hold one against the other.

Everything is a pure function of dicts of tensors. Nothing here writes to a model or an optimiser;
nothing knows batches, budgets or exits beyond their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from offramp_training.processes import ALONE, Processes

Centring = Literal["mat", "col", "row"]
Reduction = Literal["sum", "mean"]
Derivative = Literal["central", "exact"]
Parameters = dict[str, torch.Tensor]


# ---- weights -------------------------------------------------------------------------------------


class WeightNetwork(nn.Module):
    """What is known of a row's exits, [n, inputs] -> a raw weight per exit in (-1, 1), [n, K]."""

    def __init__(self, inputs: int, exits: int, hidden: int = 500) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.output = nn.Linear(hidden, exits)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        raw: torch.Tensor = torch.tanh(self.output(torch.relu(self.hidden(features))))
        return raw


def loss_weights(
    raw: torch.Tensor, eps: float, centring: Centring, processes: Processes = ALONE
) -> torch.Tensor:
    """1 + eps * (raw - its mean), [n, K]: mean 1 over the whole ("mat"), over each row's exits
    ("col"), over each exit's rows ("row"; the names are the authors').

    Nothing is clipped: weights lie within 1 +- 2 * eps and may be negative from eps = 0.5 on.
    The rows are those of all processes, where they are spread over several.
    """
    if centring == "col":
        mean = raw.mean(dim=1, keepdim=True)
    else:
        sums = processes.reduce(torch.cat([raw.sum(dim=0), raw.new_full((1,), len(raw))]), "sum")
        mean = sums[:-1] / sums[-1]
        mean = mean.mean() if centring == "mat" else mean
    return 1 + eps * (raw - mean)


def lowest_weight(eps: float, centring: Centring, rows: int, exits: int) -> float:
    """The bound that no weight falls below: one raw weight at -1, those it is centred with at 1."""
    together = {"mat": rows * exits, "row": rows, "col": exits}[centring]
    return 1 - 2 * eps * (1 - 1 / together)


def weighted_loss(
    losses: torch.Tensor, weights: torch.Tensor, reduction: Reduction = "sum"
) -> torch.Tensor:
    """Mean over rows and sum (or mean) over exits of weights * losses, both [n, K]."""
    per_exit = (weights * losses).mean(dim=0)
    return per_exit.sum() if reduction == "sum" else per_exit.mean()


# ---- the pseudo-update ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PseudoUpdate:
    """An optimiser step as a function of the gradient: base - gain * gradient."""

    base: Parameters
    gain: Mapping[str, torch.Tensor | float]
    rate: float  # a factor of every gain; where rates differ, the largest

    def __call__(self, gradients: Parameters) -> Parameters:
        return {name: self.base[name] - self.gain[name] * g for name, g in gradients.items()}

    def direction(self, gradients: Parameters) -> Parameters:
        """gain * gradient: how far the step goes, and which way uphill is in its own metric."""
        return {name: self.gain[name] * g for name, g in gradients.items()}


Rule = Callable[[Parameters], PseudoUpdate]  # from the gradient, for rules that look at its size


def clipped(rule: Rule, clip_norm: float) -> Rule:
    """The rule as it is when gradients are clipped first, with the factor held constant.

    Without it a step through Adam's diagonal overshoots by as much as clipping takes away: the
    second moments have only ever seen clipped gradients.
    """

    def clipped_rule(gradients: Parameters) -> PseudoUpdate:
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        update = rule({name: factor * g for name, g in gradients.items()})
        return replace(update, gain={name: factor * gain for name, gain in update.gain.items()})

    return clipped_rule


def sgd_update(
    parameters: Parameters,
    lr: float,
    *,
    momentum: float = 0.0,
    buffers: Mapping[str, torch.Tensor | None] | None = None,
    weight_decay: float = 0.0,
) -> PseudoUpdate:
    """SGD: theta - lr * (momentum * buffer + gradient + weight_decay * theta)."""
    base = {}
    for name, value in parameters.items():
        value = value.detach()
        buffer = (buffers or {}).get(name)
        drift = weight_decay * value
        base[name] = value - lr * (drift if buffer is None else drift + momentum * buffer)
    return PseudoUpdate(base, dict.fromkeys(parameters, lr), lr)


def adamw_gain(
    gradient: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> torch.Tensor:
    """lr / (sqrt(v) + eps) with Adam's second moment v as the coming step will have it.

    The coming step's, not the newest: an entry that has had no gradient so far (an unseen word's
    embedding, or anything in the first step) has v = 0 and would move by gradient / eps.
    """
    beta = group["betas"][1]
    square = (1 - beta) * gradient.detach().square()
    steps = 1.0
    if "exp_avg_sq" in state:
        square = square + beta * state["exp_avg_sq"]
        steps += float(state["step"])
    gain: torch.Tensor = group["lr"] / ((square / (1 - beta**steps)).sqrt() + group["eps"])
    return gain


def optimiser_update(
    optimiser: Any,
    trained: Mapping[str, nn.Parameter],
    parameters: Parameters,
    gradients: Parameters,
) -> PseudoUpdate:
    """The rule and state of a real optimiser over `trained`, for the same names in `parameters`.

    SGD: its whole step. Adam and AdamW: the gradient through the frozen diagonal, without the first
    moment and the decay, which W does not touch. The optimiser is read and never written.
    """
    group_of = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    base: Parameters = {}
    gain: dict[str, torch.Tensor | float] = {}
    for name, value in parameters.items():
        group = group_of[id(trained[name])]
        state = optimiser.state.get(trained[name], {})
        if group.get("amsgrad") is False:  # Adam and AdamW have the key, and no others
            base[name] = value.detach()
            gain[name] = adamw_gain(gradients[name], state, group)
        elif group.get("nesterov") is False and not group["dampening"]:  # likewise SGD
            step = sgd_update(
                {name: value},
                group["lr"],
                momentum=group["momentum"],
                buffers={name: state.get("momentum_buffer")},
                weight_decay=group["weight_decay"],
            )
            base |= step.base
            gain |= step.gain
        else:
            raise ValueError(
                f"no pseudo-update for {type(optimiser).__name__} as it is set; allowed: SGD "
                "without Nesterov momentum or dampening, Adam and AdamW without AMSGrad"
            )
    rate = max(float(group_of[id(trained[name])]["lr"]) for name in parameters)
    return PseudoUpdate(base, gain, rate)


# ---- the derivative ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetaGradient:
    """What one look ahead gives."""

    weights: torch.Tensor  # dL_meta / dW, [n, K]
    loss: torch.Tensor  # L_meta
    updated: Parameters  # theta_hat
    rate: float  # of the pseudo-update


def meta_gradient(
    form: Derivative,
    parameters: Parameters,
    losses: torch.Tensor,
    weights: torch.Tensor,
    *,
    rule: Rule,
    train_losses: Callable[[Parameters], torch.Tensor],
    meta_loss: Callable[[Parameters], torch.Tensor],
    reduction: Reduction = "sum",
    difference_step: float = 1e-2,
) -> MetaGradient:
    """dL_meta / dW at `weights` by one of the two forms.

    `parameters` are leaves and `losses` = `train_losses(parameters)`, [n, K], with its graph;
    `weights` is taken as a constant. `difference_step` is the distance, over all parameters, to
    each of the central form's two probes; longer where the gains differ (see `_per_distance`).
    """
    if form == "exact":
        return _exact(parameters, losses, weights, rule, meta_loss, reduction)
    gradients = _gradients(weighted_loss(losses, weights.detach(), reduction), parameters)
    update = rule(gradients)
    updated = {name: value.requires_grad_() for name, value in update(gradients).items()}
    loss = meta_loss(updated)
    uphill = _gradients(loss, updated)
    direction = update.direction(uphill)
    with torch.no_grad():
        scale = difference_step * _per_distance(uphill, direction, gradients)
        ahead, behind = (
            train_losses({n: p + sign * scale * direction[n] for n, p in parameters.items()})
            for sign in (1, -1)
        )
        terms = losses.shape[0] if reduction == "sum" else losses.numel()
        product = (ahead - behind) / (2 * scale) / terms
    return MetaGradient(-product, loss.detach(), updated, update.rate)


def _per_distance(uphill: Parameters, direction: Parameters, gradients: Parameters) -> torch.Tensor:
    """How much of `direction` changes a loss with the gradient `uphill` by the gradient's length:
    1 / |direction| where gains are equal, so that the probes are then a plain distance apart.

    Where gains differ by orders, |direction| is that of entries that hardly matter, and probes at a
    distance chosen by it would measure rounding. Entries that the train half's loss does not depend
    on (the words of the other half) have no say either.
    """
    square = product = torch.zeros((), dtype=torch.float64)
    for name, gradient in gradients.items():
        felt = uphill[name] * (gradient != 0)
        square = square.to(felt.device) + felt.square().sum(dtype=torch.float64)
        product = product.to(felt.device) + (felt * direction[name]).sum(dtype=torch.float64)
    # Nowhere to go means no difference, not 0 / 0.
    per_distance = torch.where(product > 0, square.sqrt() / product, 1.0)
    return per_distance.clamp(max=1e30).to(felt.dtype)


def _exact(
    parameters: Parameters,
    losses: torch.Tensor,
    weights: torch.Tensor,
    rule: Rule,
    meta_loss: Callable[[Parameters], torch.Tensor],
    reduction: Reduction,
) -> MetaGradient:
    """By differentiating the step. Needs operations that have a second derivative: fused attention
    has none."""
    leaf = weights.detach().requires_grad_()
    gradients = _gradients(weighted_loss(losses, leaf, reduction), parameters, create_graph=True)
    update = rule({name: g.detach() for name, g in gradients.items()})
    updated = update(gradients)
    loss = meta_loss(updated)
    (product,) = torch.autograd.grad(loss, [leaf], allow_unused=True, materialize_grads=True)
    return MetaGradient(
        product, loss.detach(), {n: p.detach() for n, p in updated.items()}, update.rate
    )


def _gradients(
    loss: torch.Tensor, parameters: Parameters, *, create_graph: bool = False
) -> Parameters:
    """By name; zeros for what the loss does not depend on."""
    gradients = torch.autograd.grad(
        loss,
        list(parameters.values()),
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(parameters, gradients, strict=True))
