"""What every stage checks on its first batch, before anything is updated: that nothing is drawn, and that the loss is
the one that is documented, against a second computation that shares no masks and no padding with it.

Shapes: T tokens, K chosen experts, R response tokens of one row, V vocabulary, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.moe.routing import Trace, flip_rate

Array = NDArray[np.float64]
SIXTEEN_BIT_TIES = 0.01
"""Share of choices that may differ between two ways to sum the same numbers in a 16-bit type."""


def check_nothing_is_drawn(stage: str, training: Trace, again: Trace, mask_BS: Tensor) -> None:
    """The model that trains routes a batch as the same model in evaluation mode does.

    Raises:
        RuntimeError: it does not, so a router draws its experts or jitters its input; names the layer.
    """
    mask_T = mask_BS.bool()
    training, again = training.masked(mask_T), again.masked(mask_T)
    for layer, index_TK in training.index_TK.items():
        flips = flip_rate(again.index_TK[layer], index_TK)
        if flips > 0 or not torch.allclose(training.logits_TE[layer], again.logits_TE[layer], rtol=1e-3, atol=1e-3):
            raise RuntimeError(
                f"{stage}: layer {layer} routes otherwise while it trains than in evaluation ({flips:.1%} of its "
                "choices differ before the first update); something in the model draws"
            )


def check_is_original(stage: str, now: Trace, original: Trace, mask_BS: Tensor, dtype: torch.dtype) -> None:
    """A model of which nothing was trained yet routes as the original does.

    Raises:
        RuntimeError: the top-k flip rate is not 0 (in a 16-bit type: more than rounding); names the layer.
    """
    mask_T = mask_BS.bool()
    now, original = now.masked(mask_T), original.masked(mask_T)
    for layer, index_TK in now.index_TK.items():
        flips = flip_rate(original.index_TK[layer], index_TK)
        if flips > (0 if dtype == torch.float32 else SIXTEEN_BIT_TIES):
            raise RuntimeError(
                f"{stage}: layer {layer} makes {flips:.1%} other choices than the original before the first update"
            )


def check_loss(stage: str, found: float, expected: float, dtype: torch.dtype) -> None:
    """The loss of the first batch is what `expected` says.

    Raises:
        RuntimeError: it is another one.
    """
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    if np.isfinite(found) and abs(found - expected) > tolerance * max(1.0, abs(expected)):
        raise RuntimeError(
            f"{stage}: the loss of the first batch is {found:.6g}, computed row by row without padding it is "
            f"{expected:.6g}; a mask, a weight or the direction of a divergence is wrong"
        )


# --- the second computation: numpy, float64, one row at a time ------------------------------------


def log_softmax(logits: Tensor) -> Array:
    """Over the last dimension."""
    values: Array = logits.detach().double().cpu().numpy()
    values = values - values.max(-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(-1, keepdims=True)))


def kl(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) over the last dimension, of log-probabilities."""
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(-1))


def repair_row(logits_RV: Tensor, response: list[int], original_RV: Tensor | None, first_token_weight: float) -> float:
    """Loss of one row before its weight: cross-entropy of the response, or KL(original || now) where that is given."""
    now = log_softmax(logits_RV)
    each = -now[np.arange(len(response)), response] if original_RV is None else kl(log_softmax(original_RV), now)
    return float(each.mean() + first_token_weight * each[0])


def routing_row(target_RE: Tensor, now_RE: Tensor, position: str, direction: str) -> float:
    """Loss of one turn in one layer, of log-probabilities at its own positions: KL(target || now) in `forward`."""
    target, now = (np.asarray(t.detach().double().cpu().numpy()) for t in (target_RE, now_RE))
    if position == "response_mean":
        target, now = (np.log(np.exp(t).mean(0, keepdims=True).clip(1e-20)) for t in (target, now))
    forward, reverse = (float(kl(*sides).mean()) for sides in ((target, now), (now, target)))
    return {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[direction]
