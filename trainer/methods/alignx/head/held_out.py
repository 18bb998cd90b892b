"""Held-out rows calibrate the head and measure it, each half under the calibration that the other half gave.

Shapes: N rows of the bank, R held-out rows, A axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.calibration import Isotonic, accuracy, brier_B, ece, fit_temperature
from trainer.methods.alignx.head.evidence import Evidence, gain
from trainer.methods.alignx.head.split import Parts
from trainer.methods.alignx.head_section import HeadSection


@dataclass(frozen=True)
class Calibrated:
    """What the head takes over (`tau`, `isotonic`: fitted on all held-out rows) and how well it does.

    `figures`: {"accuracy", "ece_before", "ece_after", "brier"} of held-out rows, before: temperature 1, no maps.
    """

    tau: float
    isotonic: Isotonic | None
    figures: dict[str, float]
    evidence: Evidence | None


def calibrate(logits_NA: Tensor, bank: Bank, parts: Parts, section: HeadSection) -> Calibrated:
    """Temperature and maps. Under auto, maps are kept where they lower the calibration error, unless the Brier score,
    which also counts how well axes are told apart, is shown to suffer."""
    labels_N, held_R = bank.labels_N, parts.held_R
    labels_R = labels_N[held_R]
    plain_RA = cross_fitted(logits_NA, labels_N, parts, section, isotonic=False)
    after_RA, evidence = plain_RA, None
    if section.isotonic != "off":
        mapped_RA = cross_fitted(logits_NA, labels_N, parts, section, isotonic=True)
        groups_R = [bank.groups_N[row] for row in held_R.tolist()]
        evidence = _maps(plain_RA, mapped_RA, labels_R, groups_R, section)
        after_RA = mapped_RA if evidence.kept else plain_RA
    tau = fit_temperature(logits_NA[held_R], labels_R) if section.temperature else 1.0
    isotonic = None
    if evidence is not None and evidence.kept:
        isotonic = Isotonic.of((logits_NA[held_R] / tau).softmax(1), labels_R)
    figures = {
        "accuracy": accuracy(after_RA, labels_R),
        "ece_before": ece(logits_NA[held_R].softmax(1), labels_R),
        "ece_after": ece(after_RA, labels_R),
        "brier": float(brier_B(after_RA, labels_R).mean()),
    }
    return Calibrated(tau, isotonic, figures, evidence)


def cross_fitted(logits_NA: Tensor, labels_N: Tensor, parts: Parts, section: HeadSection, *, isotonic: bool) -> Tensor:
    """Weights of the held-out rows, [R, A] in the order of `parts.held_R`, calibrated on the other half."""
    first, second = parts.halves
    found = []
    for rows_R, other_R in ((first, second), (second, first)):
        tau = fit_temperature(logits_NA[other_R], labels_N[other_R]) if section.temperature else 1.0
        alpha_RA = (logits_NA[rows_R] / tau).softmax(1)
        if isotonic:
            alpha_RA = Isotonic.of((logits_NA[other_R] / tau).softmax(1), labels_N[other_R])(alpha_RA)
        found.append(alpha_RA)
    return torch.cat(found)


def losses_R(logits_NA: Tensor, labels_N: Tensor, parts: Parts) -> Tensor:
    """Cross-entropy of every held-out row, each half at the other's temperature: sharpness alone gains nothing."""
    first, second = parts.halves
    return torch.cat(
        [
            cross_entropy(
                logits_NA[rows_R].double() / fit_temperature(logits_NA[other_R], labels_N[other_R]),
                labels_N[rows_R],
                reduction="none",
            )
            for rows_R, other_R in ((first, second), (second, first))
        ]
    )


def _maps(
    plain_RA: Tensor, mapped_RA: Tensor, labels_R: Tensor, groups_R: list[str], section: HeadSection
) -> Evidence:
    eces = ece(plain_RA, labels_R), ece(mapped_RA, labels_R)
    brier = gain(brier_B(plain_RA, labels_R), brier_B(mapped_RA, labels_R), groups_R)
    earned = eces[1] < eces[0] and brier.high >= 0
    reason = (
        f"with maps the held-out calibration error goes from {eces[0]:.4f} to {eces[1]:.4f}, and the Brier score "
        f"falls by {brier.mean:.4f} [{brier.low:.4f}, {brier.high:.4f}]"
    )
    gains = {"Brier, temperature alone": (brier.mean, brier.low, brier.high)}
    return Evidence(earned if section.isotonic == "auto" else True, reason, gains)
