"""SteerMoE's ranking (arXiv 2509.09660): from activation counts to the experts to activate and to deactivate.

1. Sort all experts of all layers by |Delta|, largest first, Delta = a1/(a1+d1) - a2/(a2+d2).
2. `reverse` flips the sign after sorting.
3. A+ is the first `n_pos` experts with Delta > 0, A- the first `n_neg` with Delta < 0.
4. Of A+ at most `per_layer_cap` experts of a layer stay, its router's top-k by default; the rest are dropped with a
   warning and not replaced. A- has no cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import pandas as pd

from data_prep.errors import UserError
from trainer.moe.steering import Steering

Named = tuple[int, int]
"""(decoder layer, expert)."""


@dataclass(frozen=True)
class Ranked:
    """One expert with its exact Delta, after `reverse`."""

    layer: int
    expert: int
    delta: Fraction

    @property
    def named(self) -> Named:
        return self.layer, self.expert


@dataclass(frozen=True)
class Ranking:
    """Every expert by |Delta|, largest first; ties go to the lower layer, then the lower expert."""

    ranked: tuple[Ranked, ...]

    @property
    def delta(self) -> dict[Named, float]:
        return {expert.named: float(expert.delta) for expert in self.ranked}

    def select(self, n_pos: int, n_neg: int, top_k: Mapping[int, int], per_layer_cap: int | None) -> Selection:
        """A+ and A-. `top_k` by decoder layer.

        Raises:
            UserError: fewer experts of a sign than asked for.
        """
        positive = [expert.named for expert in self.ranked if expert.delta > 0]
        negative = [expert.named for expert in self.ranked if expert.delta < 0]
        for key, wanted, found in (("n_pos", n_pos, positive), ("n_neg", n_neg, negative)):
            if wanted > len(found):
                sign = "above" if key == "n_pos" else "below"
                raise UserError(f"steer.{key}: {wanted} experts asked, {len(found)} have a risk difference {sign} 0")
        return _capped(positive[:n_pos], negative[:n_neg], top_k, per_layer_cap)

    def bottom(self, n_pos: int, n_neg: int, top_k: Mapping[int, int], per_layer_cap: int | None) -> Selection:
        """The control: as many experts from the ranking's end, where |Delta| is smallest, whatever its sign."""
        end = [expert.named for expert in reversed(self.ranked)]
        return _capped(end[n_neg : n_neg + n_pos], end[:n_neg], top_k, per_layer_cap)


def _capped(
    positive: list[Named], negative: list[Named], top_k: Mapping[int, int], per_layer_cap: int | None
) -> Selection:
    activate: list[Named] = []
    dropped: list[Named] = []
    for layer, expert in positive:
        cap = top_k[layer] if per_layer_cap is None else min(per_layer_cap, top_k[layer])
        full = sum(chosen == layer for chosen, _ in activate) >= cap
        (dropped if full else activate).append((layer, expert))
    return Selection(tuple(activate), tuple(negative), tuple(dropped))


@dataclass(frozen=True)
class Selection:
    """A+, A- in the ranking's order, and what the cap per layer took from A+."""

    activate: tuple[Named, ...]
    deactivate: tuple[Named, ...]
    dropped: tuple[Named, ...] = field(default=())

    def warning(self) -> str:
        """The line for the user about dropped experts; empty where there is none."""
        if not self.dropped:
            return ""
        shown = ", ".join(f"{layer}.{expert}" for layer, expert in self.dropped[:8])
        more = f" and {len(self.dropped) - 8} more" if len(self.dropped) > 8 else ""
        return (
            f"warning: {len(self.dropped)} of {len(self.dropped) + len(self.activate)} experts to activate dropped, "
            f"their layers already activate as many as the router chooses: {shown}{more} (layer.expert)"
        )

    def steering(self, strength: float) -> Steering:
        """The forcing of these experts."""
        return Steering(_by_layer(self.activate), _by_layer(self.deactivate), strength)


def rank(table: pd.DataFrame, *, reverse: bool) -> Ranking:
    """Rank a table of counts (columns layer, expert, a1, d1, a2, d2; one row per expert, whole numbers).

    Delta is compared as an exact fraction: equal differences tie, whatever their floating-point quotients say.

    Raises:
        UserError: a side without any token.
    """
    ranked = []
    for row in table.itertuples(index=False):
        a1, d1, a2, d2 = (int(value) for value in (row.a1, row.d1, row.a2, row.d2))
        if a1 + d1 == 0 or a2 + d2 == 0:
            side = 1 if a1 + d1 == 0 else 2
            raise UserError(f"activation counts: expert {row.expert} of layer {row.layer} has no token on side {side}")
        ranked.append(Ranked(int(row.layer), int(row.expert), Fraction(a1, a1 + d1) - Fraction(a2, a2 + d2)))
    ranked.sort(key=lambda expert: (-abs(expert.delta), expert.layer, expert.expert))
    if reverse:
        ranked = [Ranked(expert.layer, expert.expert, -expert.delta) for expert in ranked]
    return Ranking(tuple(ranked))


def _by_layer(named: tuple[Named, ...]) -> dict[int, tuple[int, ...]]:
    layers: dict[int, tuple[int, ...]] = {}
    for layer, expert in named:
        layers[layer] = (*layers.get(layer, ()), expert)
    return layers
