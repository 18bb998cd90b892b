"""The figures of docs/alignx.md, "The head" and "Calibration": on synthetic banks whose answer is known.

python -m tests.methods.alignx.head.figures
"""

from __future__ import annotations

import time

import torch

from tests.methods.alignx.head import banks
from tests.methods.alignx.head.test_dimension import NEIGHBOURS, dimensions, sheet
from trainer.methods.alignx.head.ablation import ablation
from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.calibration import accuracy, ece
from trainer.methods.alignx.head.fit import fit
from trainer.methods.alignx.head_section import HeadSection
from trainer.runtime.console import table

SETTINGS = {
    "reported": HeadSection(learning_rate=2e-5, epochs=3),
    "default": HeadSection(),
    "default without maps": HeadSection(isotonic="off"),
    "learning rate 1e-2": HeadSection(learning_rate=1e-2),
}
"""`reported`: what the authors say of AdamW."""


def dimension_rows(rows: int = 3000) -> list[list[str]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for dimension in (1, 2, 3):
        noise = 0.05 * (NEIGHBOURS / rows) ** (1 / dimension)
        bank_NK, others_BK = (sheet(n, dimension, noise, generator) for n in (rows, 400))
        d_B = dimensions(others_BK, bank_NK)
        found.append([str(dimension), f"{float(d_B.mean()):.2f}", f"{float(d_B.std()):.2f}"])
    return found


def ablation_rows(bank: Bank) -> list[list[str]]:
    return [
        [name, *(f"{figures[key]:.3f}" for key in ("accuracy", "ece_before", "ece_after", "brier"))]
        for name, figures in ablation(bank, HeadSection(), 0).items()
    ]


def optimiser_rows() -> list[list[str]]:
    bank, others = banks.bank(600, wrong=0.2), banks.bank(2000, wrong=0.2, seed=1)
    found = []
    for name, section in SETTINGS.items():
        start = time.perf_counter()
        head = fit(bank, section, 0).head
        seconds = time.perf_counter() - start
        raw_NA, alpha_NA = head.logits(others.features_NVD).softmax(1), head.alpha(others.features_NVD)
        figures = (accuracy(alpha_NA, others.labels_N), ece(raw_NA, others.labels_N), ece(alpha_NA, others.labels_N))
        found.append([name, *(f"{value:.3f}" for value in figures), f"{seconds:.1f}"])
    return found


if __name__ == "__main__":
    table("Dimension in 256 dimensions", ("true", "mean", "std"), dimension_rows())
    columns = ("head", "accuracy", "ECE before", "after", "Brier")
    table("Axes that differ in dimension alone", columns, ablation_rows(banks.of_dimensions(900)))
    table("Axes that lie apart, a fifth of the labels wrong", columns, ablation_rows(banks.bank(900, wrong=0.2)))
    table("Settings, on new prompts", ("settings", "accuracy", "ECE before", "after", "seconds"), optimiser_rows())
