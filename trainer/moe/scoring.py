"""How a router turns its logits into the weights of the experts it chose: the scoring family.

Pinning a router to given experts needs their weights under the *current* logits, so the family is identified by
reproducing a router's own output and refused when nothing reproduces it.

Shapes: T tokens, E experts, K chosen experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 2e-2
"""Largest absolute error accepted when a family reproduces bf16 router weights; fp32 routers are held to 1e-4."""


def _softmax(logits_TE: Tensor, index_TK: Tensor) -> Tensor:
    return logits_TE.float().softmax(-1).gather(-1, index_TK)


def _softmax_over_chosen(logits_TE: Tensor, index_TK: Tensor) -> Tensor:
    return logits_TE.float().gather(-1, index_TK).softmax(-1)


def _sigmoid(logits_TE: Tensor, index_TK: Tensor) -> Tensor:
    return logits_TE.float().gather(-1, index_TK).sigmoid()


def _sigmoid_renormalised(logits_TE: Tensor, index_TK: Tensor) -> Tensor:
    scores_TK = _sigmoid(logits_TE, index_TK)
    return scores_TK / (scores_TK.sum(-1, keepdim=True) + 1e-20)


FAMILIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Renormalising a full softmax over the chosen experts equals a softmax over the chosen logits: one family.
    "softmax over chosen experts": _softmax_over_chosen,
    "softmax over all experts": _softmax,
    "sigmoid, renormalised": _sigmoid_renormalised,
    "sigmoid": _sigmoid,
}


@dataclass(frozen=True)
class Scoring:
    """A router's scoring family with its constant factor (DeepSeek's `routed_scaling_factor`, else 1)."""

    family: str
    scale: float

    def weights(self, logits_TE: Tensor, index_TK: Tensor) -> Tensor:
        """Weights [T, K] (fp32) of the given experts under the given logits."""
        return self.scale * FAMILIES[self.family](logits_TE, index_TK)


def identify(logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor) -> Scoring | None:
    """Find the family that reproduces a router's own weights, or None.

    The factor is the median ratio, so that one rounding outlier does not decide it.
    """
    exact = weights_TK.dtype == logits_TE.dtype == torch.float32
    logits_TE, weights_TK = logits_TE.detach().float(), weights_TK.detach().float()
    for name, family in FAMILIES.items():
        ours_TK = family(logits_TE, index_TK)
        scale = (weights_TK / ours_TK.clamp(min=1e-12)).median().item()
        scale = 1.0 if abs(scale - 1.0) < 1e-2 else scale
        error = (scale * ours_TK - weights_TK).abs().max().item()
        if error <= (1e-4 if exact else TOLERANCE) * max(1.0, abs(scale)):
            return Scoring(name, scale)
    return None
