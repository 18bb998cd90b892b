"""Figures are those of rows that the calibration was not fitted on."""

from dataclasses import replace

import pytest
import torch

from tests.methods.alignx.head import banks
from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.calibration import Isotonic, fit_temperature
from trainer.methods.alignx.head.held_out import calibrate, cross_fitted
from trainer.methods.alignx.head.split import Parts
from trainer.methods.alignx.head_section import HeadSection


def test_each_half_is_calibrated_by_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NA = 2 * torch.randn(300, 3, generator=generator)
    labels_N = torch.multinomial(logits_NA.softmax(1), 1, generator=generator)[:, 0]
    parts = Parts(torch.arange(100), (torch.arange(100, 200), torch.arange(200, 300)))
    logits_NA[200:] *= 4
    one, other = parts.halves
    found_RA = cross_fitted(logits_NA, labels_N, parts, HeadSection(), isotonic=True)
    tau = fit_temperature(logits_NA[other], labels_N[other])
    maps = Isotonic.of((logits_NA[other] / tau).softmax(1), labels_N[other])
    assert torch.equal(found_RA[:100], maps((logits_NA[one] / tau).softmax(1)))
    plain_RA = cross_fitted(logits_NA, labels_N, parts, HeadSection(temperature=False), isotonic=False)
    assert torch.equal(plain_RA, logits_NA[parts.held_R].softmax(1))


def bank_of(labels_N: torch.Tensor) -> Bank:
    """Rows of these labels; their states are not looked at."""
    made = banks.constant(len(labels_N))
    return replace(made, labels_N=labels_N, groups_N=[str(row) for row in range(len(labels_N))])


def test_labels_of_no_meaning_show_no_accuracy_and_no_calibration() -> None:
    """Maps of many knots would fit random labels; measured on the same rows, they would look right."""
    generator = torch.Generator().manual_seed(0)
    logits_NA = 4 * torch.randn(400, 3, generator=generator)
    labels_N = torch.randint(3, (400,), generator=generator)
    parts = Parts(torch.arange(100), (torch.arange(100, 250), torch.arange(250, 400)))
    found = calibrate(logits_NA, bank_of(labels_N), parts, HeadSection(isotonic="on"))
    assert found.figures["accuracy"] < 0.45 and found.figures["brier"] > 0.65


@pytest.mark.parametrize(("flattened", "kept"), [(True, True), (False, False)])
def test_maps_are_kept_where_no_temperature_can_calibrate(flattened: bool, kept: bool) -> None:
    """Right in 80 of 100 however sure the gate is: a temperature cannot say so, maps can. Weights that are already
    right need none."""
    generator = torch.Generator().manual_seed(0)
    logits_NA = 3 * torch.randn(1500, 3, generator=generator)
    labels_N = torch.multinomial(logits_NA.softmax(1), 1, generator=generator)[:, 0]
    if flattened:
        is_wrong_N = torch.rand(1500, generator=generator) < 0.2
        labels_N = torch.where(is_wrong_N, (logits_NA.argmax(1) + 1) % 3, logits_NA.argmax(1))
    parts = Parts(torch.arange(300), (torch.arange(300, 900), torch.arange(900, 1500)))
    found = calibrate(logits_NA, bank_of(labels_N), parts, HeadSection())
    assert found.evidence is not None and found.evidence.kept == kept == (found.isotonic is not None)
    temperature = calibrate(logits_NA, bank_of(labels_N), parts, HeadSection(isotonic="off")).figures["ece_after"]
    assert found.figures["ece_after"] < temperature / 1.5 if kept else found.figures["ece_after"] == temperature


def test_maps_that_flatter_the_calibration_error_and_harm_the_brier_score_are_left_out() -> None:
    """60 rows a half: maps with few steps, which lower the calibration error by blurring which axis is meant."""
    generator = torch.Generator().manual_seed(2)
    logits_NA = 1.5 * torch.randn(180, 3, generator=generator)
    labels_N = torch.multinomial(logits_NA.softmax(1), 1, generator=generator)[:, 0]
    parts = Parts(torch.arange(60), (torch.arange(60, 120), torch.arange(120, 180)))
    ece = {
        switch: calibrate(logits_NA, bank_of(labels_N), parts, HeadSection(isotonic=switch)).figures["ece_after"]
        for switch in ("on", "off", "auto")
    }
    assert ece["on"] < ece["off"] == ece["auto"]
