"""Which rows of a bank fit the head, and which calibrate and measure it: whole groups, every axis in every part.

Shapes: N prompts of the bank, R rows of a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from data_prep.errors import UserError
from trainer.methods.alignx.head.bank import Bank


@dataclass(frozen=True)
class Parts:
    """Row numbers, sorted. What is fitted on one half of the held-out rows is measured on the other."""

    fit_R: Tensor
    halves: tuple[Tensor, Tensor]

    @property
    def held_R(self) -> Tensor:
        """Both halves, the first one first."""
        return torch.cat(self.halves)


def split(bank: Bank, held_out: float, seed: int) -> Parts:
    """Draw the parts; groups stay whole and axes keep about their shares.

    Raises:
        UserError: an axis has too few groups to be in each of the three parts.
    """
    folds = max(3, round(2 / held_out))
    labels_N, groups_N = bank.labels_N.numpy(), np.array(bank.groups_N)
    for index, axis in enumerate(bank.axes):
        found = len(set(groups_N[labels_N == index]))
        if found < folds:
            raise UserError(
                f"head.held_out: found {held_out}, but axis {axis!r} has {found} groups of prompts; allowed: {folds} "
                "groups or more, or a larger share"
            )
    drawn = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels_N, labels_N, groups_N)
    tests = [torch.from_numpy(test_R) for _, test_R in drawn]
    parts = Parts(torch.cat(tests[2:]).sort().values, (tests[0], tests[1]))
    for name, rows_R in (("fitting", parts.fit_R), ("half", tests[0]), ("half", tests[1])):
        missing = set(range(len(bank.axes))) - set(bank.labels_N[rows_R].tolist())
        if missing:
            raise UserError(
                f"head.held_out: groups stay together, and so axis {bank.axes[min(missing)]!r} is missing from a part "
                f"({name}); allowed: more groups of its prompts"
            )
    return parts
