"""The gate's loss against the same sums by hand."""

import math

import pytest
import torch

from trainer.methods.alignx.head.losses import gate_loss
from trainer.methods.alignx.head_section import HeadSection

ALPHA = [[0.7, 0.3], [0.4, 0.6]]
LABELS = [0, 0]
SHARES = [0.75, 0.25]


def loss(**weights: float) -> float:
    section = HeadSection(**{"brier_weight": 0.0, "entropy_weight": 0.0, "kl_weight": 0.0} | weights)
    logits_RBA = torch.tensor([ALPHA]).log()
    (found,) = gate_loss(logits_RBA, torch.tensor(LABELS), torch.tensor(SHARES), section).tolist()
    return found


def test_each_term_is_what_it_says() -> None:
    cross_entropy = -(math.log(0.7) + math.log(0.4)) / 2
    brier = (2 * 0.3**2 + 2 * 0.6**2) / 2
    entropy = -sum(p * math.log(p) for row in ALPHA for p in row) / 2
    kl = 0.55 * math.log(0.55 / 0.75) + 0.45 * math.log(0.45 / 0.25)
    assert loss() == pytest.approx(cross_entropy)
    assert loss(brier_weight=2.0) == pytest.approx(cross_entropy + 2 * brier)
    assert loss(entropy_weight=0.5) == pytest.approx(cross_entropy - 0.5 * entropy)
    assert loss(kl_weight=3.0) == pytest.approx(cross_entropy + 3 * kl)


def test_routing_that_forgets_an_axis_has_a_finite_gradient() -> None:
    logits_RBA = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    gate_loss(logits_RBA, torch.tensor([1]), torch.tensor([0.5, 0.5]), HeadSection()).sum().backward()
    assert logits_RBA.grad is not None and bool(logits_RBA.grad.isfinite().all())
