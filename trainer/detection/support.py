"""The edit support: which writers a correction may touch, under a budget in experts and layers.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.moe.rank_one import Unit
from trainer.moe.writers import Kind, Writer


def ranked_experts(
    scores_LE: NDArray[np.float64], experts: Sequence[int], layers: Sequence[int]
) -> list[tuple[int, int]]:
    """(decoder layer, expert), best first; ties go to the lower layer, then the lower expert."""
    order = np.argsort(-scores_LE, axis=None, kind="stable")
    found = (divmod(int(flat), scores_LE.shape[1]) for flat in order)
    return [(layers[row], expert) for row, expert in found if expert < experts[row]]


def support(
    ranked: Sequence[tuple[int, int]],
    writers: Sequence[Writer],
    kinds: Collection[Kind],
    k: int,
    most_layers: int | None,
    directed: Collection[int],
) -> tuple[Unit, ...]:
    """The `k` best experts in at most `most_layers` layers, and in these layers the other kinds of writers.

    The layers are those of the experts even where experts are not among `kinds`, so that kinds can be compared.

    Args:
        ranked: (decoder layer, expert), best first.
        directed: layers that have a direction; others are passed over.
    """
    layers: list[int] = []
    chosen: list[Unit] = []
    for layer, expert in ranked:
        is_new = layer not in layers
        if layer not in directed or (is_new and most_layers is not None and len(layers) == most_layers):
            continue
        layers += [layer] if is_new else []
        chosen.append(Unit(layer, "experts", expert))
        if len(chosen) == k:
            break
    others = [Unit(w.layer, w.kind) for w in writers if w.kind in kinds and not w.is_fused and w.layer in layers]
    return tuple(sorted([*(chosen if "experts" in kinds else []), *others]))
