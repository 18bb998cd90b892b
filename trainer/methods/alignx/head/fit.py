"""Fitting the head from a bank, in seconds and without the language model; what earns no place is left out.

Shapes: N rows of the bank, A axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.evidence import Evidence, gain, verdict
from trainer.methods.alignx.head.fit_output import fit_output
from trainer.methods.alignx.head.head import MoCaE
from trainer.methods.alignx.head.held_out import Calibrated, calibrate, losses_R
from trainer.methods.alignx.head.trial import GATE, Trial, name_of, trial
from trainer.methods.alignx.head_section import HeadSection
from trainer.runtime.console import say

__all__ = ["Fitted", "fit", "fit_output"]


@dataclass(frozen=True)
class Fitted:
    """`figures`: {"accuracy", "ece_before", "ece_after", "brier"} on held-out rows. `dropped`: piece -> why it is not
    in the head. `evidence`: piece -> what held-out rows say of it (`Evidence.as_dict`), also of those that are kept.
    """

    head: MoCaE
    figures: dict[str, float]
    dropped: dict[str, str]
    evidence: dict[str, dict[str, Any]]


def fit(bank: Bank, section: HeadSection, seed: int) -> Fitted:
    """The head that the held-out rows of the bank speak for. The same seed gives the same weights.

    Raises:
        UserError: an axis has too few groups for the three parts, or no more fitting rows than `head.neighbours`.
    """
    tried = trial(bank, section, seed)
    found = calibrators_evidence(bank, tried, section)
    chosen = [name for name, one in found.items() if one.kept]
    name = name_of(chosen)
    calibrated = calibrate(tried.logits[name], bank, tried.parts, section)
    if calibrated.evidence is not None:
        found["isotonic"] = calibrated.evidence
    for piece, reason in tried.dropped.items():
        say(f"head: warning: {piece} dropped: {reason}")
    for piece, one in found.items():
        say(f"head: {piece} {'kept' if one.kept else 'left out'}: {one.reason}")
    dropped = tried.dropped | {piece: one.reason for piece, one in found.items() if not one.kept}
    head = _assembled(bank, tried, chosen, tried.W[name], calibrated)
    return Fitted(head, calibrated.figures, dropped, {piece: one.as_dict() for piece, one in found.items()})


def calibrators_evidence(bank: Bank, tried: Trial, section: HeadSection) -> dict[str, Evidence]:
    """Of each calibrator with a signal: the gain of the gate with it over the gate alone, and over shuffled banks."""
    groups_R = [bank.groups_N[row] for row in tried.parts.held_R.tolist()]

    def losses(logits_NA: Tensor) -> Tensor:
        return losses_R(logits_NA, bank.labels_N, tried.parts)

    alone_R = losses(tried.logits[GATE])
    found = {}
    for name in tried.calibrators:
        with_R = losses(tried.logits[name_of([name])])
        control_R = torch.stack([losses(one) for one in tried.shuffled(name_of([name]))]).mean(0)
        gains = {
            "the gate alone": gain(alone_R, with_R, groups_R),
            "shuffled banks": gain(control_R, with_R, groups_R),
        }
        found[name] = verdict(gains, getattr(section, name))
    return found


def _assembled(bank: Bank, tried: Trial, chosen: list[str], W_AF: Tensor, calibrated: Calibrated) -> MoCaE:
    latent, hidden = tried.projection.P_KD.shape
    head = MoCaE(bank.axes, hidden, latent)
    head.projection = tried.projection
    head.W_r.data.copy_(W_AF)
    head.tau.fill_(calibrated.tau)
    for name in chosen:
        setattr(head, name, tried.calibrators[name])
    head.isotonic = calibrated.isotonic
    return head.eval()
