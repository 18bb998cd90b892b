"""The gate's loss: `CE + Brier - entropy + KL(mean routing || shares of the axes)`, each with its weight.

Cross-entropy and the Brier score are both proper: the first asks for sharp routing, the second is bounded where a
prompt's label is wrong. The entropy is rewarded, so that the gate is not sure after few rows, and the mean routing is
drawn to the axes' shares, so that no axis is forgotten: what these two regularisers are towards is our reading.

Shapes: R gates trained side by side, B instances, A axes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from trainer.methods.alignx.head_section import HeadSection


def gate_loss(logits_RBA: Tensor, labels_B: Tensor, shares_A: Tensor, section: HeadSection) -> Tensor:
    """The loss of each gate, [R], nats; the mean over the instances. `shares_A`: of the bank's rows, all above 0."""
    log_alpha_RBA = logits_RBA.log_softmax(-1)
    alpha_RBA = log_alpha_RBA.exp()
    target_BA = one_hot(labels_B, logits_RBA.shape[-1]).to(alpha_RBA.dtype)
    cross_entropy_R = -(target_BA * log_alpha_RBA).sum(-1).mean(-1)
    brier_R = (alpha_RBA - target_BA).square().sum(-1).mean(-1)
    entropy_R = -(alpha_RBA * log_alpha_RBA).sum(-1).mean(-1)
    mean_RA = alpha_RBA.mean(1)
    kl_R = (mean_RA * (mean_RA.clamp_min(torch.finfo(mean_RA.dtype).tiny) / shares_A).log()).sum(-1)
    return (
        cross_entropy_R
        + section.brier_weight * brier_R
        - section.entropy_weight * entropy_R
        + section.kl_weight * kl_R
    )
