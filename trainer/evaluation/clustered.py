"""Intervals of answers that hang together: one goal in many templates, one template around many goals.

Shapes: N answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

LEVEL = 0.975
"""Both tails of 2.5 %."""


@dataclass(frozen=True)
class Clusters:
    """Of every answer the goal and the template that it belongs to; None for a goal asked plainly."""

    goals: Sequence[str]
    templates: Sequence[str | None]

    def __post_init__(self) -> None:
        assert len(self.goals) == len(self.templates), "one goal and one template for every answer"

    @property
    def sizes(self) -> tuple[int, int]:
        """Distinct goals and distinct templates."""
        return len(set(self.goals)), len(set(self.templates))


def standard_error(values: Sequence[float] | NDArray[np.float64], clusters: Clusters) -> float:
    """Of the mean of `values` when goals and templates are both draws of a larger population.

    The two-way cluster-robust variance (Cameron, Gelbach & Miller 2011, eq. 2.7: by goal, plus by template, less by
    answer), each with the factor G / (G - 1); no less than either one-way variance, because the sum can fall below
    zero. A single goal or template says nothing about others: that direction is left out.
    """
    values_N = np.asarray(values, dtype=float)
    rest_N = values_N - values_N.mean()
    ways = [_summed(rest_N, names) for names in (clusters.goals, clusters.templates) if len(set(names)) > 1]
    if not ways:
        return 0.0
    answers = float((rest_N**2).sum()) * len(rest_N) / max(len(rest_N) - 1, 1)
    both = sum(ways) - answers if len(ways) == 2 else ways[0]
    return math.sqrt(max(both, *ways)) / len(rest_N)


def quantile(clusters: Clusters) -> float:
    """Student's for a 95 % interval, with as many degrees of freedom as the fewer clusters allow."""
    counted = [size for size in clusters.sizes if size > 1]
    return float(t.ppf(LEVEL, min(counted) - 1)) if counted else float(norm.ppf(LEVEL))


def rate_interval(hits: Sequence[bool], clusters: Clusters) -> tuple[float, float]:
    """95 % interval of a rate: Wilson's score interval at the effective number of answers (Korn & Graubard 1998).

    That number is what independent answers would need for the same standard error and quantile, never more than there
    are. Where all answers agree no spread can be measured; they then count as one for each goal.
    """
    n, rate = len(hits), sum(hits) / len(hits)
    z = float(norm.ppf(LEVEL))
    error = standard_error([float(hit) for hit in hits], clusters)
    if error > 0:
        effective = min(float(n), rate * (1 - rate) * (z / (quantile(clusters) * error)) ** 2)
    else:
        effective = float(clusters.sizes[0])
    return _wilson(rate, effective, z)


def _summed(rest_N: NDArray[np.float64], names: Sequence[str | None]) -> float:
    """Sum over clusters of their squared sums, for few clusters made larger by G / (G - 1)."""
    _, cluster_N = np.unique([str(name) for name in names], return_inverse=True)
    sums_G = np.bincount(cluster_N, weights=rest_N)
    return float((sums_G**2).sum()) * len(sums_G) / (len(sums_G) - 1)


def _wilson(rate: float, n: float, z: float) -> tuple[float, float]:
    middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # At 0 and 1 a bound equals the rate in exact arithmetic; rounding must not push it past.
    return max(min(middle - half, rate), 0.0), min(max(middle + half, rate), 1.0)
