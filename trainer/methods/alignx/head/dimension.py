"""The local correlation dimension of an instance in a bank: how fast its neighbours grow in number with the radius.

`C(r)` counts bank rows within r of the instance; near a d-dimensional sheet it grows as r^d, so the dimension is the
slope of log C over log r. Counts are soft (a logistic step of width eps x scale), so that the slope is smooth, and
radii lie around the bank's own scale, because features of unit norm in 256 dimensions have no neighbours at a radius
of .05. Radii are weighted by their counts: a count of n has a relative error of n^-1/2.

Source: correlation dimension after Grassberger and Procaccia (1983), taken at one point; soft counts and radii from
the bank's neighbour distances are our reading of arXiv 2602.07381.

Shapes: B instances, N bank rows, M radii, K latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

RADII, NEAREST, FARTHEST = 8, 0.5, 1.5
"""Radii, from and to, in units of the bank's scale."""
ITSELF = 1e-3
"""A bank row nearer than this share of the scale is the instance itself (a prompt of the bank) and does not count."""
FARTHER = 100.0
"""Distances beyond this many scales are taken to be this one: there is nothing there to count."""
LEAST = 0.1
"""Least dimension: where every row lies within the smallest radius, counts no longer grow."""
ROUNDING = 1e-6
"""A bank whose scale is less than this share of its longest row is one point."""


def distances(x_BK: Tensor, bank_NK: Tensor) -> Tensor:
    """Euclidean, [B, N] fp32; by products, in fp64, in which near rows keep their digits."""
    return torch.cdist(x_BK.double(), bank_NK.double(), compute_mode="use_mm_for_euclid_dist").float()


def bank_scale(bank_NK: Tensor, neighbours: int) -> float:
    """The median distance of a bank row to its `neighbours`-th nearest other row; 0 for a bank that is one point."""
    assert len(bank_NK) > neighbours, "fit refuses smaller banks"
    # The nearest is the row itself.
    scale = float(distances(bank_NK, bank_NK).kthvalue(neighbours + 1, dim=1).values.median())
    return scale if scale > ROUNDING * float(bank_NK.norm(dim=1).max()) else 0.0


def log_dimension(distances_BN: Tensor, scale: float | Tensor, eps: float | Tensor) -> Tensor:
    """Natural logarithm of the dimension at each instance, [B], finite for every scale > 0."""
    units_BN = distances_BN / scale
    units_BN = units_BN.clamp_max(FARTHER).masked_fill(units_BN < ITSELF, float("inf"))
    log_r_M = torch.linspace(NEAREST, FARTHEST, RADII, device=units_BN.device).log()
    # In logarithms throughout: far from the bank a count is smaller than the smallest number.
    log_c_BM = torch.stack([logsigmoid((r - units_BN) / eps).logsumexp(1) for r in log_r_M.exp()], dim=1)
    log_c_BM, log_r_M = log_c_BM.double(), log_r_M.double()
    # Where nothing but itself is near, the count is that of no row at all.
    log_c_BM = log_c_BM.clamp_min(torch.finfo(torch.float32).min)
    weight_BM = (log_c_BM - log_c_BM.amax(1, keepdim=True)).exp().clamp_min(1e-9)
    weight_BM = weight_BM / weight_BM.sum(1, keepdim=True)
    x_BM = log_r_M - (weight_BM * log_r_M).sum(1, keepdim=True)
    y_BM = log_c_BM - (weight_BM * log_c_BM).sum(1, keepdim=True)
    slope_B = (weight_BM * x_BM * y_BM).sum(1) / (weight_BM * x_BM.square()).sum(1)
    return slope_B.clamp_min(LEAST).log().float()
