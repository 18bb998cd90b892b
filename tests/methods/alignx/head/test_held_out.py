"""Figures are those of rows that the calibration was not fitted on."""

import torch

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


def test_labels_of_no_meaning_show_no_accuracy_and_no_calibration() -> None:
    """Maps of many knots would fit random labels; measured on the same rows, they would look right."""
    generator = torch.Generator().manual_seed(0)
    logits_NA = 4 * torch.randn(400, 3, generator=generator)
    labels_N = torch.randint(3, (400,), generator=generator)
    parts = Parts(torch.arange(100), (torch.arange(100, 250), torch.arange(250, 400)))
    found = calibrate(logits_NA, labels_N, parts, HeadSection(isotonic="on"))
    assert found.figures["accuracy"] < 0.45 and found.figures["brier"] > 0.65
