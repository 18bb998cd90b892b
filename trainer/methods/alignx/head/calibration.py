"""Calibration on held-out rows: temperature, isotonic maps, and what they are judged by.

Temperature: Guo et al. (arXiv 1706.04599), by scipy, with Platt's smoothed labels. Isotonic maps, one per axis, by
scikit-learn: each expert is calibrated before the mixture, as in arXiv 2309.14976. The target is whether the prompt
belongs to the axis.

Shapes: B instances, A axes, J knots of a map.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

BINS = 15
"""Of equal width, as Guo et al. count."""
TEMPERATURES = (0.02, 50.0)
"""Least and most."""


def accuracy(alpha_BA: Tensor, labels_B: Tensor) -> float:
    """Share of the instances whose own axis weighs most."""
    return float((alpha_BA.argmax(1) == labels_B).double().mean())


def brier_B(alpha_BA: Tensor, labels_B: Tensor) -> Tensor:
    """The Brier score of each instance, summed over the axes: 0 to 2."""
    return (alpha_BA.double() - one_hot(labels_B, alpha_BA.shape[1])).square().sum(1)


def ece(alpha_BA: Tensor, labels_B: Tensor) -> float:
    """Expected calibration error of the axis that weighs most: mean gap of weight and accuracy over the bins."""
    weight_B, chosen_B = alpha_BA.double().max(1)
    bin_B = (weight_B * BINS).long().clamp_max(BINS - 1)
    gap_B = (chosen_B == labels_B).double() - weight_B
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bin_B, gap_B)
    return float(sums.abs().sum() / len(labels_B))


def fit_temperature(logits_BA: Tensor, labels_B: Tensor) -> float:
    """The temperature with the least cross-entropy.

    Labels are smoothed by 1 / (B + 2), as Platt (1999) does: B rows that are all routed right would otherwise ask for
    a temperature of 0, and B rows do not show that an axis is never wrong.
    """
    logits_BA = logits_BA.double()
    rows, axes = logits_BA.shape
    smoothing = axes / (axes - 1) / (rows + 2)

    def loss(log_tau: float) -> float:
        return float(cross_entropy(logits_BA / math.exp(log_tau), labels_B, label_smoothing=smoothing))

    low, high = map(math.log, TEMPERATURES)
    return math.exp(float(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


class Isotonic(nn.Module):
    """A map of weights for every axis, never falling, linear between its knots; mapped weights are normalised."""

    x_AJ: Tensor
    y_AJ: Tensor

    def __init__(self, axes: int, knots: int) -> None:
        super().__init__()
        self.register_buffer("x_AJ", torch.zeros(axes, knots))
        self.register_buffer("y_AJ", torch.zeros(axes, knots))

    @classmethod
    def of(cls, alpha_BA: Tensor, labels_B: Tensor) -> Isotonic:
        """Fitted to the weights that instances got, and whether each axis was theirs.

        Maps stay within 1 / (B + 2) of 0 and 1: B rows do not show that an axis is never right.
        """
        least = 1 / (len(labels_B) + 2)
        fitted = [
            IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(
                alpha_BA[:, a].double().numpy(), (labels_B == a).double().numpy()
            )
            for a in range(alpha_BA.shape[1])
        ]
        knots = max(2, *(len(one.X_thresholds_) for one in fitted))
        made = cls(len(fitted), knots)
        for a, one in enumerate(fitted):
            # Maps with fewer knots repeat their last one.
            at = [min(j, len(one.X_thresholds_) - 1) for j in range(knots)]
            made.x_AJ[a] = torch.from_numpy(one.X_thresholds_[at])
            made.y_AJ[a] = torch.from_numpy(one.y_thresholds_[at])
        return made

    def mapped(self, alpha_BA: Tensor) -> Tensor:
        """The maps alone, [B, A]."""
        alpha_AB = alpha_BA.T.contiguous()
        after_AB = torch.searchsorted(self.x_AJ, alpha_AB, right=True).clamp(1, self.x_AJ.shape[1] - 1)
        x0_AB, x1_AB = self.x_AJ.gather(1, after_AB - 1), self.x_AJ.gather(1, after_AB)
        y0_AB, y1_AB = self.y_AJ.gather(1, after_AB - 1), self.y_AJ.gather(1, after_AB)
        width_AB = (x1_AB - x0_AB).clamp_min(torch.finfo(alpha_BA.dtype).tiny)
        return torch.lerp(y0_AB, y1_AB, ((alpha_AB - x0_AB) / width_AB).clamp(0, 1)).T

    def forward(self, alpha_BA: Tensor) -> Tensor:
        """Mapped and normalised, [B, A]."""
        mapped_BA = self.mapped(alpha_BA)
        return mapped_BA / mapped_BA.sum(1, keepdim=True)
