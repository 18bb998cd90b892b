"""Fitting: what earns its place is kept, what carries no signal is dropped aloud, held-out prompts train nothing."""

from dataclasses import replace

import pytest
import torch

from data_prep.errors import UserError
from tests.methods.alignx.head import banks
from trainer.methods.alignx.head.calibration import accuracy, ece
from trainer.methods.alignx.head.evidence import gain, verdict
from trainer.methods.alignx.head.fit import fit
from trainer.methods.alignx.head.split import split
from trainer.methods.alignx.head_section import HeadSection
from trainer.recipe.errors import one_line


def test_axes_that_lie_apart_are_told_apart() -> None:
    found = fit(banks.bank(300), HeadSection(), 0)
    assert found.figures["accuracy"] >= 0.98
    others = banks.bank(300, seed=1)
    assert accuracy(found.head.alpha(others.features_NVD), others.labels_N) >= 0.98


def test_the_fractal_calibrator_is_kept_where_axes_differ_in_dimension_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = HeadSection()
    found = fit(banks.of_dimensions(600), section, 0)
    assert found.head.fractal is not None and found.evidence["fractal"]["kept"]
    assert found.evidence["fractal"]["gains"]["shuffled banks"][1] > 0.05
    assert found.head.natural is None and "not shown" in found.dropped["natural"]
    alone = fit(banks.of_dimensions(600), section.model_copy(update={"fractal": "off"}), 0)
    assert found.figures["accuracy"] > alone.figures["accuracy"] + 0.1
    said = capsys.readouterr().out
    assert "head: fractal kept: the held-out loss falls by" in said and "head: natural left out" in said


def test_calibrators_that_add_nothing_are_left_out_unless_the_recipe_says_so() -> None:
    found = fit(banks.bank(240), HeadSection(), 0)
    assert found.head.fractal is None and found.head.natural is None
    assert {"fractal", "natural"} <= found.dropped.keys() and {"fractal", "natural"} <= found.evidence.keys()
    asked = fit(banks.bank(240), HeadSection(fractal="on", natural="off"), 0)
    assert asked.head.fractal is not None and asked.head.natural is None
    assert "but the recipe says on" in asked.evidence["fractal"]["reason"] and "natural" not in asked.evidence


def test_constant_banks_give_no_nan_and_their_terms_are_dropped_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    bank = banks.constant(120)
    found = fit(bank, HeadSection(fractal="on", natural="on"), 0)
    assert found.head.fractal is None and found.head.natural is None
    assert found.dropped["fractal"] == "the bank of an axis is one point, so it has no dimension"
    assert found.dropped["natural"] == "the natural term is the same for every prompt"
    alpha_NA = found.head.alpha(bank.features_NVD)
    assert torch.allclose(alpha_NA, torch.full_like(alpha_NA, 1 / 3), atol=0.05)
    assert all(value == value for value in found.figures.values())
    said = capsys.readouterr().out
    assert "head: warning: fractal dropped:" in said and "head: warning: natural dropped:" in said


def test_a_bank_no_larger_than_the_neighbours_is_refused() -> None:
    with pytest.raises(UserError, match=r"head.neighbours: found 40, but the bank of axis 'helpful' has 36 rows"):
        fit(banks.bank(180), HeadSection(neighbours=40), 0)
    fit(banks.bank(180), HeadSection(neighbours=40, fractal="off", epochs=1), 0)


def test_the_calibration_error_falls_to_half_or_less() -> None:
    """Labels that are wrong now and then make a gate that is too sure; measured on held-out groups and on new rows."""
    found = fit(banks.bank(1200, wrong=0.3), HeadSection(learning_rate=1e-2, epochs=60), 0)
    assert found.figures["ece_before"] > 0.08
    assert found.figures["ece_after"] <= found.figures["ece_before"] / 2
    others = banks.bank(2000, wrong=0.3, seed=1)
    before_NA, after_NA = found.head.logits(others.features_NVD).softmax(1), found.head.alpha(others.features_NVD)
    assert ece(after_NA, others.labels_N) <= ece(before_NA, others.labels_N) / 2


def test_the_same_seed_gives_the_same_weights() -> None:
    section = HeadSection(fractal="on", natural="on", isotonic="on", epochs=3)
    torch.manual_seed(1)
    one = fit(banks.bank(180), section, 5).head.state_dict()
    torch.manual_seed(2)
    again = fit(banks.bank(180), section, 5).head.state_dict()
    assert one.keys() == again.keys() and all(torch.equal(one[name], again[name]) for name in one)
    other = fit(banks.bank(180), section, 6).head.state_dict()
    assert not torch.equal(one["W_r"], other["W_r"])


def test_held_out_prompts_train_nothing() -> None:
    """Other states in the held-out rows move the calibration at most: projection, gate and banks keep their bits."""
    section = HeadSection(fractal="on", natural="on", isotonic="on", epochs=3)
    bank = banks.bank(180)
    held_R = split(bank, section.held_out, 0).held_R
    features_NVD = bank.features_NVD.clone()
    features_NVD[held_R] = banks.bank(180, seed=9).features_NVD[held_R] + 3
    one, other = (fit(b, section, 0).head.state_dict() for b in (bank, replace(bank, features_NVD=features_NVD)))
    calibration = {"tau", "isotonic.x_AJ", "isotonic.y_AJ"}
    for name in one.keys() - calibration:
        assert torch.equal(one[name], other[name]), name
    assert not torch.equal(one["tau"], other["tau"])


def test_each_piece_can_be_switched_off() -> None:
    bank = banks.bank(180, wrong=0.2)
    bare = fit(bank, HeadSection(fractal="off", natural="off", isotonic="off", temperature=False, epochs=3), 0)
    assert set(bare.head.state_dict()) == {"W_r", "tau", "projection.P_KD", "projection.mean_VD"}
    assert float(bare.head.tau) == 1 and not bare.evidence and not bare.dropped
    ungated = fit(bank, HeadSection(gate=False, natural="on", fractal="off"), 0)
    assert not ungated.head.W_r.any() and ungated.figures["accuracy"] > 0.6
    with pytest.raises(ValueError, match=r"found false with fractal and natural off") as raised:
        HeadSection(gate=False, fractal="off", natural="off")
    assert "gate" in one_line(raised.value, HeadSection, "head")


def test_a_gain_counts_groups_and_not_rows() -> None:
    without_R, with_R = torch.tensor([1.0] * 40 + [0.0] * 4), torch.zeros(44)
    groups = ["one"] * 40 + ["two", "three", "four", "five"]
    assert gain(without_R, with_R, groups).mean == pytest.approx(0.2)
    assert not gain(without_R, with_R, groups).earned
    assert gain(without_R, with_R, [str(i) for i in range(44)]).earned
    assert not gain(without_R, with_R, ["one"] * 44).earned


def test_every_gain_has_to_be_earned() -> None:
    good, bad = gain(torch.ones(4), torch.zeros(4), list("abcd")), gain(torch.zeros(4), torch.ones(4), list("abcd"))
    assert verdict({"a": good, "b": good}, "auto").kept and not verdict({"a": good, "b": bad}, "auto").kept
