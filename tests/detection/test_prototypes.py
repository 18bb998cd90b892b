"""Directions of one behaviour: found, orthogonal to what must stay, dropped where nothing else is left."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.detection.prototypes import Groups, layer_directions, orthogonal

D = 512
E = np.eye(D)
COMMON = 5 * E[-1]
"""What every state has."""


def states(rng: np.random.Generator, number: int, *means: np.ndarray) -> np.ndarray:
    """[P, 1, D] around the means in turn, and what every state has."""
    width = 0.2 / np.sqrt(D)
    return np.stack([[COMMON + means[i % len(means)] + width * rng.standard_normal(D)] for i in range(number)])


def groups(*wrong: np.ndarray, harmful: np.ndarray = 2 * E[0], seed: int = 0) -> Groups:
    rng = np.random.default_rng(seed)
    return Groups(states(rng, 24, *wrong), states(rng, 30, np.zeros(D)), states(rng, 24, harmful))


def test_two_reasons_are_two_prototypes_and_both_are_in_the_direction() -> None:
    fitted = groups(2 * E[0] + E[1], 2 * E[0] + E[2])
    (layer,) = layer_directions(fitted, groups(2 * E[0] + E[1], 2 * E[0] + E[2], seed=1), 2, "kmeans", 4, 0)
    assert layer.direction_D is not None and len(layer.shares) == 2 and layer.dropped == 0
    assert layer.shares == pytest.approx((0.5, 0.5))
    assert np.linalg.norm(layer.direction_D) == pytest.approx(1)
    assert min(layer.direction_D[1], layer.direction_D[2]) > 0.5
    assert abs(layer.direction_D[0]) < 0.05, "harmful refusal is left alone"
    assert layer.auc == 1.0 and layer.cosine == pytest.approx(2 / np.sqrt(4 + 0.5), abs=0.02)


def test_a_larger_and_clearer_cluster_weighs_more() -> None:
    wrong = [E[1], E[1], 0.5 * E[2]]
    (layer,) = layer_directions(groups(*wrong), groups(*wrong, seed=1), 2, "kmeans", 4, 0)
    assert layer.direction_D is not None and layer.direction_D[1] > 2 * layer.direction_D[2] > 0


def test_a_direction_collinear_with_harmful_refusal_is_dropped() -> None:
    (layer,) = layer_directions(groups(3 * E[0], 3 * E[0] + 3 * E[4]), groups(E[0]), 2, "kmeans", 4, 0)
    assert layer.dropped == 1 and layer.direction_D is not None and layer.direction_D[4] > 0.9
    (none,) = layer_directions(groups(3 * E[0]), groups(E[0]), 1, "kmeans", 4, 0)
    assert none.direction_D is None and none.dropped == 1 and none.auc is None


def test_harmful_refusals_of_several_kinds_are_all_left_alone() -> None:
    rng = np.random.default_rng(0)
    wrong = states(rng, 24, E[0] + E[1], E[3] + E[2])
    fitted = Groups(wrong, states(rng, 30, np.zeros(D)), states(rng, 24, 2 * E[0], 2 * E[3]))
    (layer,) = layer_directions(fitted, fitted, 2, "kmeans", 4, 0)
    assert layer.direction_D is not None
    assert max(abs(layer.direction_D[0]), abs(layer.direction_D[3])) < 0.1


def test_what_answered_prompts_have_is_left_alone() -> None:
    fitted = groups(E[1] + 0.5 * COMMON, harmful=2 * E[0])
    (layer,) = layer_directions(fitted, fitted, 1, "kmeans", 4, 0)
    assert layer.direction_D is not None and layer.direction_D[1] > 0.9
    assert abs(float(layer.direction_D @ fitted.right[:, 0].mean(0))) < 0.05


def test_a_self_organising_map_finds_the_same_reasons() -> None:
    fitted = groups(2 * E[0] + E[1], 2 * E[0] + E[2])
    first, again = (layer_directions(fitted, fitted, 1, "som", 4, 3)[0] for _ in range(2))
    assert first.direction_D is not None and again.direction_D is not None
    assert np.array_equal(first.direction_D, again.direction_D), "seeded"
    assert first.direction_D[1] > 0.5 and first.direction_D[2] > 0.5


def test_fewer_prompts_than_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="24 wrongly refused prompts are fewer than the 25 clusters"):
        layer_directions(groups(E[1]), groups(E[1]), 25, "kmeans", 4, 0)


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), kept=st.integers(1, 5))
def test_what_is_kept_has_no_part_in_the_direction(seed: int, kept: int) -> None:
    rng = np.random.default_rng(seed)
    direction_D, kept_KD = rng.standard_normal(D), rng.standard_normal((kept, D))
    unit_D = orthogonal(direction_D, kept_KD)
    if unit_D is not None:
        assert np.allclose(kept_KD @ unit_D, 0, atol=1e-10) and np.linalg.norm(unit_D) == pytest.approx(1)
    inside_D = rng.standard_normal(kept) @ kept_KD
    assert orthogonal(inside_D, kept_KD) is None
    one = orthogonal(direction_D, kept_KD[:1])
    r_D = kept_KD[0]
    left_D = direction_D - (direction_D @ r_D) / (r_D @ r_D) * r_D
    assert one is None or np.allclose(one, left_D / np.linalg.norm(left_D))
