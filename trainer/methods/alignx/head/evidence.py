"""Whether a piece of the head earns its place: a paired gain on held-out rows, with its interval over groups.

Shapes: R held-out rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from scipy.stats import ttest_1samp
from torch import Tensor

EARNED = 1e-3
"""Least gain, in nats, that the interval has to lie above: rows that are all routed right gain without end."""


@dataclass(frozen=True)
class Gain:
    """The mean fall of a loss, nats per row, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def earned(self) -> bool:
        return self.low > EARNED

    def __str__(self) -> str:
        return f"{self.mean:.4f} nats [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Evidence:
    """What held-out rows say of a piece. `gains`: what it is measured against -> mean and ends of the interval."""

    kept: bool
    reason: str
    gains: dict[str, tuple[float, float, float]]

    def as_dict(self) -> dict[str, Any]:
        """JSON form: `{"kept", "reason", "gains": {name: [mean, low, high]}}`."""
        return asdict(self) | {"gains": {name: list(gain) for name, gain in self.gains.items()}}


def gain(without_R: Tensor, with_R: Tensor, groups_R: Sequence[str]) -> Gain:
    """Student's interval over the means of the groups: rows of one group are no independent evidence."""
    falls: dict[str, list[float]] = defaultdict(list)
    for group, fall in zip(groups_R, (without_R - with_R).tolist(), strict=True):
        falls[group].append(fall)
    means = [fmean(one) for one in falls.values()]
    mean = fmean(means)
    if len(means) < 2:
        return Gain(mean, float("-inf"), float("inf"))
    if max(means) - min(means) < 1e-12:
        return Gain(mean, mean, mean)
    low, high = ttest_1samp(means, 0.0).confidence_interval(0.95)
    return Gain(mean, float(low), float(high))


def verdict(gains: dict[str, Gain], switch: str) -> Evidence:
    """Kept where every gain is earned, or where the recipe says so."""
    measured = "; ".join(f"{found} against {name}" for name, found in gains.items())
    earned = all(found.earned for found in gains.values())
    kept = earned if switch == "auto" else switch == "on"
    reason = f"the held-out loss falls by {measured}; " + ("earned" if earned else f"not shown to be above {EARNED}")
    if kept != earned:
        reason += f", but the recipe says {switch}"
    return Evidence(kept, reason, {name: (one.mean, one.low, one.high) for name, one in gains.items()})
