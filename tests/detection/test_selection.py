"""The sorted global top-K."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data_prep.errors import UserError
from trainer.detection.selection import resolve_k, top_k

scores = arrays(np.float64, (3, 5), elements=st.floats(-1, 1))


@given(scores, st.integers(1, 15))
def test_no_expert_left_out_scores_higher_than_one_taken(scores_LE: np.ndarray, k: int) -> None:
    chosen = top_k(scores_LE, [5, 5, 5], k, None)
    assert len(chosen) == len(set(chosen)) == k
    worst = min(scores_LE[c] for c in chosen)
    assert all(scores_LE[i, e] <= worst for i in range(3) for e in range(5) if (i, e) not in chosen)


@given(scores, st.integers(1, 6), st.integers(2, 4))
def test_the_cap_holds_in_every_layer_and_within_it_the_best_are_taken(
    scores_LE: np.ndarray, k: int, cap: int
) -> None:
    chosen = top_k(scores_LE, [5, 5, 5], k, cap)
    assert len(chosen) == k
    for layer in range(3):
        taken = [e for i, e in chosen if i == layer]
        assert len(taken) <= cap
        if taken:
            worst = min(scores_LE[layer, e] for e in taken)
            assert all(scores_LE[layer, e] <= worst for e in range(5) if e not in taken)


def test_selection_is_global_and_sorted_not_the_first_layers() -> None:
    scores_LE = np.array([[0.1, 0.2], [0.9, 0.0], [0.3, 0.8]])
    assert top_k(scores_LE, [2, 2, 2], 3, None) == [(1, 0), (2, 1), (2, 0)]


def test_columns_beyond_a_layers_experts_are_never_taken() -> None:
    assert top_k(np.zeros((2, 4)), [2, 4], 6, None) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize(("given_", "total", "expected"), [(0.125, 192, 24), (24, 192, 24), (0.1, 64, 6)])
def test_top_k_is_a_number_or_a_share_of_all_experts(given_: float, total: int, expected: int) -> None:
    assert resolve_k(given_, total, None, 6) == expected


@pytest.mark.parametrize(
    ("k", "cap", "message"),
    [
        (192, None, "detect.top_k: 192 selects 192 experts; allowed: 1 to 191"),
        (500, None, "detect.top_k: 500 selects 500 experts"),
        (0.001, None, "selects 0 experts"),
        (24, 3, "detect.per_layer_cap: 3 x 6 layers admits 18"),
    ],
)
def test_a_k_that_cannot_be_selected_is_refused_with_the_bounds(k: float, cap: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_k(k, 192, cap, 6)
