"""The head's pieces in one table, from one bank and one split: is a calibrator more than capacity?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.held_out import calibrate
from trainer.methods.alignx.head.trial import GATE, name_of, trial
from trainer.methods.alignx.head_section import HeadSection

Row = dict[str, float]
"""{"accuracy", "ece_before", "ece_after", "brier"} on held-out rows."""


def ablation(bank: Bank, section: HeadSection, seed: int) -> dict[str, Row]:
    """`gate_only`, `gate_fractal`, `gate_natural`, `gate_fractal_natural`, and `gate_shuffled`: the last with every
    bank shuffled, the mean over the draws. Calibrators that are off, or carry no signal, have no rows.

    Raises:
        UserError: as `fit`.
    """
    tried = trial(bank, section, seed)

    def row(heads: Sequence[Tensor]) -> Row:
        each = [calibrate(logits_NA, bank, tried.parts, section).figures for logits_NA in heads]
        return {figure: fmean(one[figure] for one in each) for figure in each[0]}

    named = list(tried.calibrators)
    names = dict.fromkeys([GATE, *(name_of([one]) for one in named), name_of(named)])
    table = {name: row([tried.logits[name]]) for name in names}
    if named:
        table["gate_shuffled"] = row(tried.shuffled(name_of(named)))
    return table
