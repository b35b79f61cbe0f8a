"""The arithmetic of learning when to leave by reinforcement (ConsistentEE, sections 2 to 4).

Exits come first in every shape: E exits in ascending order, B rows, K trajectories per row. A
trajectory is the 0-based exit that it leaves by; the last exit is forced, so there are E - 1 gates
and no log-probability for the end. Pure functions; they know nothing about networks or stages.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

Baseline = Literal["own_mean", "leave_one_out"]


def memorised_exits(right: torch.Tensor) -> torch.Tensor:
    """The first exit from which on all are right: bool [E, N] -> int64 [N], 0-based.

    The last exit where that one is wrong itself: such a row is as hard as can be.
    """
    right_to_the_end = right.flip(0).long().cumprod(dim=0).sum(dim=0)
    return right.shape[0] - right_to_the_end.clamp(min=1)


def exit_rewards(
    cross_entropies: torch.Tensor,
    exit_layers: torch.Tensor,
    memorised_layers: torch.Tensor,
    *,
    alpha: float,
    hardness: bool = True,
) -> torch.Tensor:
    """-CE - alpha * layer * (1 - ML / L) of leaving at each exit: CE [E, B], layers [E], ML [B] ->
    [E, B], a constant for every gradient. Without `hardness` every row feels the whole cost.
    """
    layers = exit_layers.to(cross_entropies)
    ease = 1.0 - memorised_layers.to(cross_entropies) / layers[-1]
    pressure = ease if hardness else torch.ones_like(ease)
    return -cross_entropies.detach() - alpha * layers[:, None] * pressure


def log_exit_probabilities(gate_logits: torch.Tensor) -> torch.Tensor:
    """log P(exit) of a row that meets the gates in turn: gate logits [E - 1, B] -> [E, B].

    At least float32, whatever precision the gates ran in.
    """
    logits = gate_logits if gate_logits.dtype == torch.float64 else gate_logits.float()
    nothing = logits.new_zeros(1, logits.shape[1])
    came_so_far = torch.cat([nothing, functional.logsigmoid(-logits).cumsum(dim=0)])
    return came_so_far + torch.cat([functional.logsigmoid(logits), nothing])


def sample_exits(gate_logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Trajectories by the gates: logits [E - 1, B], uniform draws [K, E - 1, B] -> int64 [K, B]."""
    chances = torch.sigmoid(gate_logits.detach().float())
    leaves = functional.pad(draws < chances, (0, 0, 0, 1), value=True)  # forced at the last exit
    return leaves.int().argmax(dim=1)


def advantages(rewards: torch.Tensor, baseline: Baseline) -> torch.Tensor:
    """Each trajectory's reward over its row's baseline: [K, B] -> [K, B].

    "own_mean" takes the mean of all K, "leave_one_out" that of the other K - 1. Exactly zero where
    all trajectories of a row earned the same.
    """
    count = rewards.shape[0]
    over_the_first = rewards - rewards[:1]
    above_mean = over_the_first - over_the_first.mean(dim=0)
    return above_mean * (count / (count - 1)) if baseline == "leave_one_out" else above_mean


def policy_loss(
    gate_logits: torch.Tensor, rewards: torch.Tensor, exits: torch.Tensor, baseline: Baseline
) -> torch.Tensor:
    """What to descend so that well rewarded trajectories become likelier (REINFORCE).

    Gate logits [E - 1, B], rewards by exit [E, B], sampled exits [K, B] -> a scalar, the mean over
    rows and trajectories. Only the gate logits get a gradient.
    """
    gained = advantages(rewards.detach().gather(0, exits), baseline)
    return -(gained * log_exit_probabilities(gate_logits).gather(0, exits)).mean()


def sampled_cross_entropy(cross_entropies: torch.Tensor, exits: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy at the sampled exits, CE [E, B] and exits [K, B] -> a scalar; heads that
    no trajectory left by get a gradient of zero."""
    return cross_entropies.gather(0, exits).mean()


def expected_reward(gate_logits: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """The exact mean reward over all trajectories: [E - 1, B] and [E, B] -> [B]. Its gradient is
    what the sampled one estimates."""
    return (log_exit_probabilities(gate_logits).exp() * rewards).sum(dim=0)
