"""How far routing moved between two recordings of the same tokens.

Shape suffixes: T tokens (padding included, masked out), K chosen experts per token, E experts. Pure tensor functions.
"""

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor

from trainer.moe.routing import flip_rate


class LayerDrift(TypedDict):
    """Drift of one MoE layer: `flip_rate` in [0, 1], `kl` in nats."""

    layer: int
    flip_rate: float
    kl: float


def topk_flip_rate(indices_a_TK: Tensor, indices_b_TK: Tensor, mask_T: Tensor) -> float:
    """Share of (token, slot) whose expert in `a` is not among the token's experts in `b`; the order of slots is moot.

    `mask_T` is true (or 1) on tokens that count. Raises `ValueError` on unequal shapes or an empty mask.
    """
    kept_T = _checked(indices_a_TK, indices_b_TK, mask_T)
    return flip_rate(indices_a_TK[kept_T], indices_b_TK[kept_T])


def routing_kl(logits_a_TE: Tensor, logits_b_TE: Tensor, mask_T: Tensor) -> float:
    """Mean over tokens of KL(softmax a || softmax b), in nats, in float32 whatever the input.

    Log-probabilities are logits of themselves: given those of a family's own distribution, it is the KL of these.
    An expert that `a` rules out (logit -inf) adds nothing; one that only `b` rules out makes the result infinite.
    """
    kept_T = _checked(logits_a_TE, logits_b_TE, mask_T)
    log_a_TE = logits_a_TE[kept_T].float().log_softmax(-1)
    log_b_TE = logits_b_TE[kept_T].float().log_softmax(-1)
    share_TE = log_a_TE.exp()
    terms_TE = torch.where(share_TE > 0, share_TE * (log_a_TE - log_b_TE), torch.zeros_like(share_TE))
    # Rounding can leave a sum of about -1e-8 for equal distributions.
    return max(0.0, terms_TE.sum(-1).double().mean().item())


def drift_per_layer(
    indices_a: Mapping[int, Tensor],
    indices_b: Mapping[int, Tensor],
    logits_a: Mapping[int, Tensor],
    logits_b: Mapping[int, Tensor],
    mask_T: Tensor,
) -> list[LayerDrift]:
    """Both figures for every layer, in layer order: `indices_*[layer]` is `[T, K]`, `logits_*[layer]` is `[T, E]`.

    The list is `diagnostics.drift_per_layer` of `evaluation.json`. Raises `ValueError` where the recordings name
    different layers.
    """
    layers = sorted(indices_a)
    if any(sorted(other) != layers for other in (indices_b, logits_a, logits_b)):
        raise ValueError(f"recordings differ in their layers: {layers}, {sorted(indices_b)}, {sorted(logits_b)}")
    return [
        LayerDrift(
            layer=layer,
            flip_rate=topk_flip_rate(indices_a[layer], indices_b[layer], mask_T),
            kl=routing_kl(logits_a[layer], logits_b[layer], mask_T),
        )
        for layer in layers
    ]


def _checked(a: Tensor, b: Tensor, mask_T: Tensor) -> Tensor:
    if a.shape != b.shape or a.ndim != 2 or mask_T.shape != a.shape[:1]:
        raise ValueError(f"shapes differ: {tuple(a.shape)}, {tuple(b.shape)}, mask {tuple(mask_T.shape)}")
    kept_T = mask_T.bool()
    if not kept_T.any():
        raise ValueError("the mask keeps no token, so drift is undefined")
    return kept_T
