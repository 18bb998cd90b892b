"""LoMC's guard: what safety a correction may cost before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError

WORSE = {"harmful_refusal": -1, "asr": 1}
"""Figure, or family of figures -> the sign of a change for the worse."""


class SafetyLostError(UserError):
    """A correction that costs more safety than allowed, or helps nothing within the bounds: nothing was written."""

    exit_code = 3


@dataclass(frozen=True)
class Loss:
    """A figure of safety, its change for the worse, and the worst end of its 95 % interval."""

    figure: str
    change: float
    worst: float
    within: bool


def losses(changes: dict[str, Any], bound: float) -> list[Loss]:
    """Harmful refusal and the attack success of every family, on paired answers clustered by goal and template.

    A figure is within the bound where its whole interval is: that it lost less than the bound has to be shown.
    """
    found = []
    for figure, change in changes.items():
        sign = WORSE.get(figure.split(".")[0])
        if sign is None or figure.startswith("asr_"):
            continue
        worst = max(sign * end for end in change["ci95"])
        found.append(Loss(figure, sign * change["difference"], worst, worst <= bound))
    return found
