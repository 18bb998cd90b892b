"""How far two judges agree on the same replies, and how far one agrees with labels of people."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, get_args

from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import cohen_kappa_score

from trainer.model.reply import Verdict

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


def agreement(one: Sequence[Verdict], other: Sequence[Verdict]) -> dict[str, Any]:
    """`n`, `agree` (share, in [0, 1]), Cohen's `kappa` (in [-1, 1]) and the `table` of both judges' verdicts.

    "unjudged" is a verdict of its own: a judge that says nothing agrees with none that says something. `kappa` is None
    where chance alone would agree always (both judges gave one and the same verdict). `table[a][b]`: replies that
    `one` called a and `other` b. Raises `ValueError` for lists of different lengths, or empty ones.

    Source: Cohen, "A coefficient of agreement for nominal scales", 1960.
    """
    if len(one) != len(other) or not one:
        raise ValueError(f"agreement needs as many verdicts of both judges, one or more: {len(one)} and {len(other)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 where both gave one verdict
        kappa = float(cohen_kappa_score(list(one), list(other), labels=list(VERDICTS)))
    pairs = list(zip(one, other, strict=True))
    return {
        "n": len(pairs),
        "agree": sum(a == b for a, b in pairs) / len(pairs),
        "kappa": None if math.isnan(kappa) else kappa,
        "table": {a: {b: pairs.count((a, b)) for b in VERDICTS} for a in VERDICTS},
    }
