"""The joint loss against numbers worked out by hand."""

from math import log

import pytest
import torch

from offramp_training.objectives.joint import exit_weights, joint_loss
from offramp_training.objectives.row_losses import exit_cross_entropies

# Two exits, two rows, two classes. Logits are logs, so that softmax gives these probabilities:
# exit 1: row 1 right with 3/4, row 2 right with 1/2; exit 2: row 1 with 1/5, row 2 with 9/10.
LOGITS = torch.tensor(
    [[[log(3.0), 0.0], [0.0, 0.0]], [[0.0, log(4.0)], [0.0, log(9.0)]]], dtype=torch.float64
)
LABELS = torch.tensor([0, 1])
CE_1 = (log(4 / 3) + log(2)) / 2
CE_2 = (log(5) + log(10 / 9)) / 2


def test_cross_entropies_by_exit_and_row() -> None:
    expected = torch.tensor([[log(4 / 3), log(2)], [log(5), log(10 / 9)]], dtype=torch.float64)
    torch.testing.assert_close(exit_cross_entropies(LOGITS, LABELS), expected)


@pytest.mark.parametrize(
    ("weights", "reduction", "expected"),
    [
        ("uniform", "sum", CE_1 + CE_2),
        ("uniform", "weighted", (CE_1 + CE_2) / 2),
        ("depth", "sum", 2 * CE_1 + 6 * CE_2),  # exits at layers 2 and 6
        ("depth", "weighted", (2 * CE_1 + 6 * CE_2) / 8),
        ((0.5, 0.0), "sum", 0.5 * CE_1),
        ((1.0, 3.0), "weighted", (CE_1 + 3 * CE_2) / 4),
    ],
)
def test_joint_loss(weights: str | tuple[float, ...], reduction: str, expected: float) -> None:
    losses = exit_cross_entropies(LOGITS, LABELS)
    loss = joint_loss(losses, exit_weights(weights, (2, 6)), reduction)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_the_gradient_of_an_exit_scales_with_its_weight() -> None:
    logits = LOGITS.clone().requires_grad_()
    losses = exit_cross_entropies(logits, LABELS)
    joint_loss(losses, exit_weights((1.0, 3.0), (1, 2)), "sum").backward()
    probabilities = torch.softmax(LOGITS, dim=-1)
    wrong = probabilities - torch.nn.functional.one_hot(LABELS, 2)
    expected = wrong / 2 * torch.tensor([1.0, 3.0])[:, None, None]
    torch.testing.assert_close(logits.grad, expected)


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has 3 weights; the model has 2 exits, at layers 2, 6"):
        exit_weights((1.0, 1.0, 1.0), (2, 6))
    with pytest.raises(ValueError, match="at least one must be above 0"):
        exit_weights((0.0, 0.0), (2, 6))
