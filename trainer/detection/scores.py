"""Scores of every expert from activation counts, and how stable a selection by them is.

Shapes: P pairs, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.detection.counts import Counts, Side
from trainer.detection.selection import top_k

Score = Literal["aad", "risk_difference", "gate_mass"]
Pool = Literal["token", "pair"]


def score(counts: Counts, kind: Score, pool: Pool) -> NDArray[np.float64]:
    """Score [L, E]; large means activated by successful jailbreaks more than by the refused plain goals.

    * `aad` (RASA, Adversarial Activation Discrepancy): difference of P(active), every pair weighing the same.
      `pool="token"`: P is a pair's share of counted tokens; `pool="pair"`: whether the expert is active at all (the
      paper's 0/1 per input).
    * `risk_difference` (SteerMoE): `a1/(a1+d1) - a2/(a2+d2)` over the pooled tokens of all pairs; sums to zero per
      layer. RASA's released code scores this way. `pool` does not apply.
    * `gate_mass`: difference of the mean routing weight per counted token, every pair weighing the same. `pool` does
      not apply.
    """
    return _rates(counts.adversarial, kind, pool) - _rates(counts.anchor, kind, pool)


def _rates(side: Side, kind: Score, pool: Pool) -> NDArray[np.float64]:
    if kind == "risk_difference":
        return side.active() / max(side.tokens, 1)
    if kind == "aad" and pool == "pair":
        return (side.hits_PLE > 0).mean(0)
    per_token = side.mass_PLE if kind == "gate_mass" else side.hits_PLE
    return (per_token / np.maximum(side.tokens_P, 1)[:, None, None]).mean(0)


def stability(
    score_of: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    samples: int,
    experts: list[int],
    k: int,
    per_layer_cap: int | None,
    resamples: int,
    seed: int,
) -> NDArray[np.float64]:
    """Share [L, E] of bootstrap resamples in which an expert is among the selected `k`.

    `score_of(rows)` is the score of a resample; `rows` are drawn with replacement from `samples` pairs, or batches of
    pairs.
    """
    generator = np.random.default_rng(seed)
    selected_LE = np.zeros((len(experts), max(experts)))
    for _ in range(resamples):
        scores_LE = score_of(generator.integers(samples, size=samples))
        for layer, expert in top_k(scores_LE, experts, k, per_layer_cap):
            selected_LE[layer, expert] += 1
    return selected_LE / max(resamples, 1)
