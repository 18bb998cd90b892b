"""Every head that is compared: the gate alone, with each calibrator, with both, and with calibrators from shuffled
banks (the axes of the bank's rows dealt anew: as much capacity, no geometry). All on one split of one bank.

Shapes: N rows of the bank, V views, K latent size, A axes, G heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import UserError
from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.calibrators import Fractal, Natural, no_signal
from trainer.methods.alignx.head.gate import train_gates
from trainer.methods.alignx.head.head import Projection
from trainer.methods.alignx.head.split import Parts, split
from trainer.methods.alignx.head_section import HeadSection

SHUFFLES = 3
"""Draws of the control."""

GATE = "gate_only"
Calibrators = dict[str, Fractal | Natural]


@dataclass(frozen=True)
class Trial:
    """`calibrators`: those that carry a signal. `dropped`: the others -> why. `W`, `logits`: of each head by name, the
    logits of all rows of the bank."""

    parts: Parts
    projection: Projection
    calibrators: Calibrators
    dropped: dict[str, str]
    W: dict[str, Tensor]
    logits: dict[str, Tensor]

    def shuffled(self, name: str) -> list[Tensor]:
        """The logits of the controls of a head, one for each draw."""
        return [self.logits[_control(name, draw)] for draw in range(SHUFFLES)]


def name_of(calibrators: Sequence[str]) -> str:
    """`gate_only`, `gate_fractal`, `gate_natural`, `gate_fractal_natural`."""
    return "_".join(["gate", *calibrators]) if calibrators else GATE


def trial(bank: Bank, section: HeadSection, seed: int) -> Trial:
    """Train them all.

    Raises:
        UserError: an axis has too few groups, or no more fitting rows than `head.neighbours`.
    """
    parts = split(bank, section.held_out, seed)
    fit_R = parts.fit_R
    labels_R = bank.labels_N[fit_R]
    _check_neighbours(bank, labels_R, section)
    generator = torch.Generator().manual_seed(seed)
    projection = Projection.of(bank.features_NVD[fit_R], section.latent, generator)
    f_NVK = projection(bank.features_NVD)
    calibrators, terms, dropped = _with_signal(f_NVK, fit_R, labels_R, bank, section)
    named = [name for name in ("fractal", "natural") if name in calibrators]
    heads = {name_of(some): some for some in ([], *([name] for name in named), named)}
    none_NA = torch.zeros(len(bank.labels_N), len(bank.axes))
    sums = {name: sum((terms[one] for one in some), none_NA) for name, some in heads.items()}
    for draw in range(SHUFFLES):
        dealt_R = labels_R[torch.randperm(len(labels_R), generator=generator)]
        _, control, _ = _with_signal(f_NVK, fit_R, dealt_R, bank, section)
        for name, some in heads.items():
            if some:
                sums[_control(name, draw)] = sum((control.get(one, none_NA) for one in some), none_NA)
    f_NF = f_NVK.flatten(1)
    terms_GNA = torch.stack(list(sums.values()))
    shares_A = torch.bincount(labels_R).float() / len(labels_R)
    W_GAF = train_gates(f_NF[fit_R], terms_GNA[:, fit_R], labels_R, shares_A, section, seed)
    logits_GNA = torch.einsum("nf,gaf->gna", f_NF, W_GAF) + terms_GNA
    return Trial(
        parts,
        projection,
        calibrators,
        dropped,
        dict(zip(sums, W_GAF, strict=True)),
        dict(zip(sums, logits_GNA, strict=True)),
    )


def _control(name: str, draw: int) -> str:
    return f"{name}, shuffled banks {draw}"


def _with_signal(
    f_NVK: Tensor, fit_R: Tensor, labels_R: Tensor, bank: Bank, section: HeadSection
) -> tuple[Calibrators, dict[str, Tensor], dict[str, str]]:
    """Calibrators from the fitting rows, their terms for every row, and why others are dropped."""
    axes, f_RVK = len(bank.axes), f_NVK[fit_R]
    made: Calibrators = {}
    if section.fractal != "off":
        made["fractal"] = Fractal.of(f_RVK, labels_R, axes, section.neighbours, section.eps, section.fractal_weight)
    if section.natural != "off":
        made["natural"] = Natural.of(f_RVK, labels_R, axes, section.natural_weight)
    kept: Calibrators = {}
    terms, dropped = {}, {}
    for name, calibrator in made.items():
        term_NA = calibrator(f_NVK)
        reason = no_signal(name, calibrator, term_NA)
        if reason is None:
            kept[name], terms[name] = calibrator, term_NA
        else:
            dropped[name] = reason
    return kept, terms, dropped


def _check_neighbours(bank: Bank, labels_R: Tensor, section: HeadSection) -> None:
    if section.fractal == "off":
        return
    for index, axis in enumerate(bank.axes):
        rows = int((labels_R == index).sum())
        if rows <= section.neighbours:
            raise UserError(
                f"head.neighbours: found {section.neighbours}, but the bank of axis {axis!r} has {rows} rows to fit "
                "on; allowed: fewer neighbours than rows, or head.fractal: off"
            )
