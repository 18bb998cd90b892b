"""Temperature, isotonic maps and the figures that judge them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from trainer.methods.alignx.head.calibration import Isotonic, accuracy, brier_B, ece, fit_temperature


def drawn(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits_BA = 2 * torch.randn(rows, 3, generator=generator)
    return logits_BA, torch.multinomial(logits_BA.softmax(1), 1, generator=generator)[:, 0]


def test_figures_of_a_case_by_hand() -> None:
    alpha_BA = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])
    labels_B = torch.tensor([0, 1, 1, 0])
    assert accuracy(alpha_BA, labels_B) == 0.75
    # Bins of 1/15: (0.9, 0.9) is right once, (0.6) once, (0.5) once.
    assert ece(alpha_BA, labels_B) == pytest.approx((abs(1 - 1.8) + 0.4 + 0.5) / 4)
    assert brier_B(alpha_BA, labels_B).tolist() == pytest.approx([0.02, 1.62, 0.32, 0.5])


def test_weights_of_1_are_in_the_last_bin() -> None:
    assert ece(torch.eye(3), torch.tensor([0, 1, 2])) == 0
    assert ece(torch.eye(3), torch.tensor([1, 2, 0])) == 1


@pytest.mark.parametrize("factor", [0.3, 4.0])
def test_temperature_takes_back_logits_that_were_scaled(factor: float) -> None:
    logits_BA, labels_B = drawn(4000, 0)
    tau = fit_temperature(factor * logits_BA, labels_B)
    assert tau == pytest.approx(factor, rel=0.06)
    before, after = (ece((factor * logits_BA / t).softmax(1), labels_B) for t in (1.0, tau))
    assert after < before / 3


@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_rows_that_are_all_right_are_as_sure_as_their_number_allows(scale: float) -> None:
    labels_B = torch.arange(60) % 3
    logits_BA = scale * torch.eye(3)[labels_B]
    alpha_BA = (logits_BA / fit_temperature(logits_BA, labels_B)).softmax(1)
    assert torch.allclose(alpha_BA.amax(1), torch.full((60,), 1 - 1 / 62), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10_000), st.booleans())
def test_maps_never_fall_and_weights_sum_to_1(rows: int, seed: int, tied: bool) -> None:
    logits_BA, labels_B = drawn(rows, seed)
    alpha_BA = logits_BA.softmax(1)
    made = Isotonic.of(alpha_BA.round(decimals=1) if tied else alpha_BA, labels_B)
    grid_BA = torch.linspace(0, 1, 101)[:, None].expand(-1, 3)
    mapped_BA = made.mapped(grid_BA)
    assert bool((mapped_BA.diff(dim=0) >= -1e-6).all())
    assert float(mapped_BA.min()) > 0 and float(mapped_BA.max()) < 1
    calibrated_BA = made(alpha_BA)
    assert bool(calibrated_BA.isfinite().all())
    assert torch.allclose(calibrated_BA.sum(1), torch.ones(rows), atol=1e-6)


def test_maps_are_those_of_scikit_learn() -> None:
    logits_BA, labels_B = drawn(300, 1)
    alpha_BA = logits_BA.softmax(1)
    mapped_BA = Isotonic.of(alpha_BA, labels_B).mapped(alpha_BA)
    for axis in range(3):
        theirs = IsotonicRegression(y_min=1 / 302, y_max=1 - 1 / 302, out_of_bounds="clip")
        expected = theirs.fit_transform(alpha_BA[:, axis].double().numpy(), (labels_B == axis).double().numpy())
        assert np.allclose(mapped_BA[:, axis].numpy(), expected, atol=1e-4)
