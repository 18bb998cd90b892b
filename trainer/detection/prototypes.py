"""Prototype directions of one behaviour, and the one direction per layer that they are aggregated to.

Prompts that show a behaviour (wrongly refused ones) may do so for several reasons. Their states are clustered; each
cluster gives a direction from the prompts that do not show it, made orthogonal to what must stay: the differences of
clusters of refused harmful prompts, whose span holds that of their mean, and the states of clusters of answered
prompts, which taking the direction away would change too. The layer's direction is the mean of the
prototypes', weighted by share x separation and normalised.

Source: the order support, prototypes, layer-wise direction is that of LoMC (arXiv 2606.13709, abstract); clusters,
weights and their choice are our reading. Orthogonal to harmful refusal: as arXiv 2410.03415 does in dense models.

Shapes: P, Q, R prompts, K clusters, L layers, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import roc_auc_score

Clustering = Literal["kmeans", "som"]
Array = NDArray[np.float64]
COLLINEAR = 0.1
"""A direction of which less than this share is left, once it is orthogonal to harmful refusal, is dropped."""
GRID = 4
"""Side of the self-organising map."""
MAP_UPDATES = 500
"""Of the self-organising map."""


@dataclass(frozen=True)
class Groups:
    """States by what the model did: `wrong` [P, L, D] shows the behaviour, `right` [Q, L, D] does not, `harmful`
    [R, L, D] is refused and must stay so.
    """

    wrong: Array
    right: Array
    harmful: Array


@dataclass(frozen=True)
class LayerDirection:
    """`direction_D`: unit vector, None where every prototype was dropped. `shares`, `separations`: of those kept.
    `dropped`: clusters whose direction was collinear with harmful refusal. `auc`: how well the direction tells
    held-out prompts of the two kinds apart; None without any. `cosine`: of the mean of the prompts that show the
    behaviour with harmful refusal, both from the mean of those that do not; near 1 there is little to correct by.
    """

    direction_D: Array | None
    shares: tuple[float, ...]
    separations: tuple[float, ...]
    dropped: int
    auc: float | None
    cosine: float


def layer_directions(
    fitted: Groups, held_out: Groups, clusters: int, clustering: Clustering, protected: int, seed: int
) -> list[LayerDirection]:
    """One for every layer. `protected`: clusters of refused harmful prompts, and of answered ones, to spare.

    Raises:
        ValueError: fewer wrongly refused prompts than clusters.
    """
    return [
        _layer_direction(_at(fitted, layer), _at(held_out, layer), clusters, clustering, protected, seed)
        for layer in range(fitted.wrong.shape[1])
    ]


def _at(groups: Groups, layer: int) -> Groups:
    """The states [P, D], [Q, D], [R, D] of one layer."""
    return Groups(groups.wrong[:, layer], groups.right[:, layer], groups.harmful[:, layer])


def _layer_direction(
    fitted: Groups, held_out: Groups, clusters: int, clustering: Clustering, protected: int, seed: int
) -> LayerDirection:
    wrong_PD, right_QD = fitted.wrong, fitted.right
    middle_D = right_QD.mean(0)
    refusals_KD, answers_KD = (
        np.stack([centre_D for centre_D, _ in _clustered(of, min(protected, len(of)), "kmeans", seed)])
        for of in (fitted.harmful, right_QD)
    )
    kept_KD = np.concatenate([refusals_KD - middle_D, answers_KD])
    shown_D, refusal_D = wrong_PD.mean(0) - middle_D, fitted.harmful.mean(0) - middle_D
    lengths = float(np.linalg.norm(shown_D) * np.linalg.norm(refusal_D))
    cosine = float(shown_D @ refusal_D) / lengths if lengths else 0.0
    directions, shares, separations, dropped = [], [], [], 0
    for centre_D, members in _clustered(wrong_PD, clusters, clustering, seed):
        unit_D = orthogonal(centre_D - middle_D, kept_KD)
        if unit_D is None:
            dropped += 1
            continue
        spread = float(np.sqrt((np.var(right_QD @ unit_D) + np.var(wrong_PD[members] @ unit_D)) / 2))
        directions.append(unit_D)
        shares.append(len(members) / len(wrong_PD))
        separations.append(float((centre_D - middle_D) @ unit_D) / max(spread, 1e-12))
    if not directions:
        return LayerDirection(None, (), (), dropped, None, cosine)
    weights_K = np.array(shares) * np.array(separations)
    summed_D = weights_K @ np.stack(directions)
    direction_D = summed_D / np.linalg.norm(summed_D)
    wrong, right = held_out.wrong @ direction_D, held_out.right @ direction_D
    auc = None
    if len(wrong) and len(right):
        auc = float(roc_auc_score([1] * len(wrong) + [0] * len(right), np.concatenate([wrong, right])))
    return LayerDirection(direction_D, tuple(shares), tuple(separations), dropped, auc, cosine)


def orthogonal(direction_D: Array, kept_KD: Array) -> Array | None:
    """The unit vector along what is left of `direction_D` without its part in the span of `kept_KD`; None where hardly
    any is. For one vector r: `w - (w.r / r.r) r`.
    """
    basis_DR, sizes_R = np.linalg.svd(kept_KD.T, full_matrices=False)[:2]
    basis_DR = basis_DR[:, sizes_R > 1e-9 * sizes_R.max(initial=0.0)]
    left_D = direction_D - basis_DR @ (basis_DR.T @ direction_D)
    length = float(np.linalg.norm(left_D))
    if length <= COLLINEAR * float(np.linalg.norm(direction_D)):
        return None
    unit_D: Array = left_D / length
    return unit_D


def _clustered(
    wrong_PD: Array, clusters: int, clustering: Clustering, seed: int
) -> list[tuple[Array, NDArray[np.int64]]]:
    """(centre, rows) of every cluster that has rows."""
    if len(wrong_PD) < clusters:
        raise ValueError(f"{len(wrong_PD)} wrongly refused prompts are fewer than the {clusters} clusters asked for")
    if clustering == "som":
        return _mapped(wrong_PD, seed)
    fitted = KMeans(clusters, n_init=10, random_state=seed).fit(wrong_PD)
    return [(fitted.cluster_centers_[k], np.flatnonzero(fitted.labels_ == k)) for k in range(clusters)]


def _mapped(wrong_PD: Array, seed: int) -> list[tuple[Array, NDArray[np.int64]]]:
    """A self-organising map of 4 x 4 neurons: neuron k is the centre of the prompts nearest to it."""
    from minisom import MiniSom

    som = MiniSom(GRID, GRID, wrong_PD.shape[1], sigma=1.0, learning_rate=0.5, random_seed=seed)
    som.pca_weights_init(wrong_PD) if len(wrong_PD) > 1 else som.random_weights_init(wrong_PD)
    som.train(wrong_PD, MAP_UPDATES)
    rows = som.win_map(wrong_PD, return_indices=True)
    weights = som.get_weights()
    return [(weights[at], np.array(found)) for at, found in sorted(rows.items())]
