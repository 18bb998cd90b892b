"""From scores to an ExpertSet: a sorted global top-K, with an optional cap per layer.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError


def resolve_k(top_k: int | float, total: int, per_layer_cap: int | None, layers: int) -> int:
    """Number of experts to select: `top_k` itself, or that share of all experts when it is a fraction.

    Raises:
        UserError: not even one expert, all experts or more, or more than the cap per layer admits.
    """
    k = round(top_k * total) if isinstance(top_k, float) else top_k
    if not 1 <= k < total:
        raise UserError(
            f"detect.top_k: {top_k} selects {k} experts; allowed: 1 to {total - 1} (the model has {total})"
        )
    if per_layer_cap is not None and k > per_layer_cap * layers:
        raise UserError(
            f"detect.per_layer_cap: {per_layer_cap} x {layers} layers admits {per_layer_cap * layers} experts, "
            f"fewer than detect.top_k = {k}"
        )
    return k


def top_k(
    scores_LE: NDArray[np.float64], experts: list[int], k: int, per_layer_cap: int | None
) -> list[tuple[int, int]]:
    """The `k` best (layer position, expert), best first; ties go to the lower layer, then the lower expert.

    `experts[i]` is the number of real columns of row i.
    """
    width = scores_LE.shape[1]
    order = np.argsort(-scores_LE, axis=None, kind="stable")
    taken = [0] * len(experts)
    chosen: list[tuple[int, int]] = []
    for flat in order:
        layer, expert = divmod(int(flat), width)
        if expert >= experts[layer] or (per_layer_cap is not None and taken[layer] >= per_layer_cap):
            continue
        taken[layer] += 1
        chosen.append((layer, expert))
        if len(chosen) == k:
            break
    return chosen
