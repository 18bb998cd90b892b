"""The estimator of local correlation dimension: right where the dimension is known, finite everywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.methods.alignx.head.dimension import bank_scale, distances, log_dimension

WIDTH = 256
NEIGHBOURS, EPS = 16, 0.05


def sheet(rows: int, dimension: int, noise: float, generator: torch.Generator) -> Tensor:
    """A unit line, square or cube, turned at random in 256 dimensions, with noise of that length in all of them."""
    turned = torch.linalg.qr(torch.randn(WIDTH, dimension, generator=torch.Generator().manual_seed(dimension)))[0].T
    flat = torch.rand(rows, dimension, generator=generator) @ turned
    return flat + noise * torch.randn(rows, WIDTH, generator=generator) / WIDTH**0.5


def dimensions(x_BK: Tensor, bank_NK: Tensor) -> Tensor:
    return log_dimension(distances(x_BK, bank_NK), bank_scale(bank_NK, NEIGHBOURS), EPS).exp()


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_line_plane_and_cube_have_dimension_1_2_and_3(dimension: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 3000
    noise = 0.05 * (NEIGHBOURS / rows) ** (1 / dimension)  # a twentieth of the distance to the neighbours
    bank_NK, others_BK = (sheet(n, dimension, noise, generator) for n in (rows, 400))
    assert float(dimensions(others_BK, bank_NK).mean()) == pytest.approx(dimension, abs=0.15)
    # Rows of the bank themselves are read the same: they are not their own neighbours.
    assert float(dimensions(bank_NK[:400], bank_NK).mean()) == pytest.approx(dimension, abs=0.15)


def test_the_estimate_does_not_depend_on_the_size_of_the_bank_in_space() -> None:
    generator = torch.Generator().manual_seed(0)
    bank_NK, x_BK = sheet(400, 2, 1e-3, generator), sheet(50, 2, 1e-3, generator)
    assert torch.allclose(dimensions(x_BK, bank_NK), dimensions(1000 * x_BK, 1000 * bank_NK), rtol=1e-3)


def test_a_bank_that_is_one_point_has_scale_0() -> None:
    assert bank_scale(torch.ones(20, 4), NEIGHBOURS) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40),
    st.floats(1e-6, 1e4),
    st.sampled_from([0.001, 0.05, 0.9]),
)
def test_every_instance_has_a_finite_dimension(far: list[float], scale: float, eps: float) -> None:
    (log_d,) = log_dimension(torch.tensor([far]), scale, eps).tolist()
    # The slope of the soft count itself is the steepest there is.
    assert math.log(0.1) - 1e-6 <= log_d <= math.log(1.5 / eps) + 0.2


def test_an_instance_is_not_its_own_neighbour() -> None:
    distances_BN = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)) + 0.2
    itself_BN = torch.cat([distances_BN, torch.zeros(1, 1)], dim=1)
    assert torch.equal(log_dimension(itself_BN, 0.5, EPS), log_dimension(distances_BN, 0.5, EPS))


def test_an_instance_far_from_the_bank_is_read_as_steep_whatever_the_distance() -> None:
    near_BN = torch.full((1, 20), 100.0)
    far_BN = torch.full((1, 20), 1e12)
    assert torch.equal(log_dimension(near_BN, 1.0, EPS), log_dimension(far_BN, 1.0, EPS))
    assert float(log_dimension(far_BN, 1.0, EPS).exp()) > 20


def test_rows_that_differ_by_rounding_alone_are_one_point() -> None:
    draw = torch.Generator().manual_seed(0)
    rows_NK = torch.ones(20, 64) + 1e-7 * torch.randn(20, 64, generator=draw)
    assert len({tuple(row) for row in rows_NK.tolist()}) > 1
    assert bank_scale(rows_NK, NEIGHBOURS) == 0
