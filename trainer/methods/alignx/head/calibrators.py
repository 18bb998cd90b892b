"""The two calibrators: terms of the routing logits that are read off the banks, not learned by gradient.

    fractal_i = -(log D_i - mean_j log D_j)        natural_i = cos(f_0, prototype_i)

D_i is the local correlation dimension of the instance's view under adapter i among the views of axis i's prompts under
the same adapter; f_0 is its view under the base. That the fractal term takes each expert's own view is our reading.

Shapes: B instances, V views (base, then the A axes), K latent size, N bank rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.methods.alignx.head.dimension import bank_scale, distances, log_dimension

NO_SIGNAL = 1e-4
"""A term whose logits differ between the axes by less than this (standard deviation) says nothing."""


class Fractal(nn.Module):
    """The geometry calibrator. An instance that is itself in the bank does not count as its own neighbour."""

    bank_NK: Tensor
    labels_N: Tensor
    scale_A: Tensor
    eps: Tensor
    weight: Tensor

    def __init__(self, axes: int, latent: int, rows: int) -> None:
        super().__init__()
        self.register_buffer("bank_NK", torch.zeros(rows, latent))
        self.register_buffer("labels_N", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("scale_A", torch.ones(axes))
        self.register_buffer("eps", torch.tensor(0.0))
        self.register_buffer("weight", torch.tensor(0.0))

    @classmethod
    def of(cls, f_NVK: Tensor, labels_N: Tensor, axes: int, neighbours: int, eps: float, weight: float) -> Fractal:
        """From the projected views of a bank; each axis needs more rows than `neighbours`."""
        made = cls(axes, f_NVK.shape[2], len(f_NVK))
        made.bank_NK.copy_(f_NVK[torch.arange(len(f_NVK)), 1 + labels_N])
        made.labels_N.copy_(labels_N)
        made.scale_A.copy_(torch.tensor([bank_scale(made.bank_NK[labels_N == a], neighbours) for a in range(axes)]))
        made.eps.fill_(eps)
        made.weight.fill_(weight)
        return made

    def log_dimensions(self, f_BVK: Tensor) -> Tensor:
        """Of each instance in each axis' bank, [B, A]."""
        found = [
            log_dimension(distances(f_BVK[:, 1 + a], self.bank_NK[self.labels_N == a]), scale, self.eps)
            for a, scale in enumerate(self.scale_A)
        ]
        return torch.stack(found, dim=1)

    def forward(self, f_BVK: Tensor) -> Tensor:
        """The weighted term, [B, A]."""
        log_d_BA = self.log_dimensions(f_BVK)
        return -self.weight * (log_d_BA - log_d_BA.mean(1, keepdim=True))


class Natural(nn.Module):
    """The prototype calibrator: how near the base's view of a prompt is to the mean of an axis' prompts."""

    prototype_AK: Tensor
    weight: Tensor

    def __init__(self, axes: int, latent: int) -> None:
        super().__init__()
        self.register_buffer("prototype_AK", torch.zeros(axes, latent))
        self.register_buffer("weight", torch.tensor(0.0))

    @classmethod
    def of(cls, f_NVK: Tensor, labels_N: Tensor, axes: int, weight: float) -> Natural:
        """From the projected views of a bank."""
        made = cls(axes, f_NVK.shape[2])
        means_AK = torch.stack([f_NVK[labels_N == a, 0].mean(0) for a in range(axes)])
        made.prototype_AK.copy_(normalize(means_AK, dim=1))
        made.weight.fill_(weight)
        return made

    def forward(self, f_BVK: Tensor) -> Tensor:
        """The weighted term, [B, A]."""
        return self.weight * f_BVK[:, 0] @ self.prototype_AK.T


def signal(term_BA: Tensor) -> float:
    """How much a term says: the largest standard deviation, over instances, of an axis' logit from the mean logit.

    The same shift for every prompt counts as nothing: the gate's own business is which axis is more frequent.
    """
    centred_BA = term_BA - term_BA.mean(1, keepdim=True)
    return float(centred_BA.std(0, correction=0).max())


def no_signal(name: str, calibrator: Fractal | Natural, term_BA: Tensor) -> str | None:
    """Why a calibrator has to be dropped, or None."""
    if isinstance(calibrator, Fractal) and not bool((calibrator.scale_A > 0).all()):
        return "the bank of an axis is one point, so it has no dimension"
    if not bool(term_BA.isfinite().all()):
        return "the term is not finite on the bank"
    if signal(term_BA) < NO_SIGNAL:
        return f"the {name} term is the same for every prompt"
    return None
