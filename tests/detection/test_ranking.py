"""The ranking of SteerMoE, against a table made independently of it."""

from fractions import Fraction

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from trainer.detection.ranking import rank
from trainer.detection.tables import check_counts

N1, N2 = 60, 40


def table(counts: dict[tuple[int, int], tuple[int, int]], n1: int = N1, n2: int = N2) -> pd.DataFrame:
    rows = [(layer, e, a1, n1 - a1, a2, n2 - a2) for (layer, e), (a1, a2) in counts.items()]
    return pd.DataFrame(rows, columns=["layer", "expert", "a1", "d1", "a2", "d2"])


# Delta = a1/60 - a2/40, worked out by hand: .5, .25, -.5, -.25 | .4, -.4, .1, -.1
HAND = table(
    {
        (0, 0): (30, 0),
        (0, 1): (30, 10),
        (0, 2): (0, 20),
        (0, 3): (0, 10),
        (1, 0): (36, 8),
        (1, 1): (12, 24),
        (1, 2): (6, 0),
        (1, 3): (6, 8),
    }
)
TOP_K = {0: 1, 1: 1}


def test_the_hand_made_table_is_ranked_to_the_last_expert() -> None:
    ranking = rank(HAND, reverse=False)
    assert [r.named for r in ranking.ranked] == [(0, 0), (0, 2), (1, 0), (1, 1), (0, 1), (0, 3), (1, 2), (1, 3)]
    assert [float(r.delta) for r in ranking.ranked] == pytest.approx([0.5, -0.5, 0.4, -0.4, 0.25, -0.25, 0.1, -0.1])
    chosen = ranking.select(2, 3, TOP_K, None)
    assert set(chosen.activate) == {(0, 0), (1, 0)}
    assert set(chosen.deactivate) == {(0, 2), (1, 1), (0, 3)}


def test_reverse_flips_the_sign_after_sorting() -> None:
    chosen = rank(HAND, reverse=True).select(2, 2, TOP_K, None)
    assert set(chosen.activate) == {(0, 2), (1, 1)} and set(chosen.deactivate) == {(0, 0), (1, 0)}


def test_more_activated_experts_in_a_layer_than_its_top_k_are_dropped_with_a_warning_and_not_replaced() -> None:
    chosen = rank(HAND, reverse=False).select(3, 0, TOP_K, None)
    assert chosen.activate == ((0, 0), (1, 0)) and chosen.dropped == ((0, 1),)
    assert "1 of 3 experts to activate dropped" in chosen.warning() and "0.1" in chosen.warning()
    assert rank(HAND, reverse=False).select(3, 0, {0: 2, 1: 2}, None).warning() == ""
    assert rank(HAND, reverse=False).select(3, 0, {0: 2, 1: 2}, 1).dropped == ((0, 1),)


def test_there_is_no_cap_on_deactivated_experts() -> None:
    assert len(rank(HAND, reverse=False).select(0, 4, TOP_K, 1).deactivate) == 4


def test_the_bottom_of_the_ranking_is_where_the_difference_is_smallest() -> None:
    lowest = rank(HAND, reverse=False).bottom(1, 2, TOP_K, None)
    assert lowest.deactivate == ((1, 3), (1, 2)) and lowest.activate == ((0, 3),)


@pytest.mark.parametrize(("n_pos", "n_neg", "key"), [(5, 0, "n_pos"), (0, 5, "n_neg")])
def test_fewer_experts_of_a_sign_than_asked_is_an_error(n_pos: int, n_neg: int, key: str) -> None:
    with pytest.raises(UserError, match=f"steer.{key}: 5 experts asked, 4 have a risk difference"):
        rank(HAND, reverse=False).select(n_pos, n_neg, TOP_K, None)


def test_experts_that_differ_nowhere_are_never_chosen() -> None:
    equal = table({(0, 0): (30, 20), (0, 1): (30, 20)})
    with pytest.raises(UserError, match="0 have a risk difference above 0"):
        rank(equal, reverse=False).select(1, 0, {0: 1}, None)


def test_a_side_without_tokens_is_an_error() -> None:
    with pytest.raises(UserError, match="expert 0 of layer 0 has no token on side 2"):
        rank(table({(0, 0): (30, 0)}, n2=0), reverse=False)


def test_equal_differences_tie_where_floating_point_would_tell_them_apart() -> None:
    """9/60 - 2/40 and 6/60 - 0/40 are both exactly .1; as doubles they differ in the last bit."""
    assert 9 / 60 - 2 / 40 != 6 / 60 - 0 / 40
    ranking = rank(table({(0, 1): (6, 0), (0, 0): (9, 2), (1, 0): (3, 6)}), reverse=False)
    assert [r.named for r in ranking.ranked] == [(0, 0), (0, 1), (1, 0)]  # all three tie: layer, then expert


@st.composite
def measurements(draw: st.DrawFn) -> tuple[pd.DataFrame, int]:
    """A table that a router could have produced: k experts per token and layer on both sides."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(3, 6))
    k = draw(st.integers(1, experts - 1))
    n1, n2 = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rows = []
    for layer in range(layers):
        sides = []
        for n in (n1, n2):
            active = [0] * experts
            for _ in range(n):
                for expert in draw(st.permutations(range(experts)))[:k]:
                    active[expert] += 1
            sides.append(active)
        rows += [(layer, e, sides[0][e], n1 - sides[0][e], sides[1][e], n2 - sides[1][e]) for e in range(experts)]
    return pd.DataFrame(rows, columns=["layer", "expert", "a1", "d1", "a2", "d2"]), k


@given(measurements(), st.integers(0, 4), st.integers(0, 4), st.booleans(), st.randoms())
@settings(max_examples=60, deadline=None)
def test_any_measurement_obeys_the_invariants_and_is_ranked_as_by_the_plain_reading_of_the_paper(
    measured: tuple[pd.DataFrame, int], n_pos: int, n_neg: int, reverse: bool, random: object
) -> None:
    counts, k = measured
    check_counts(counts, "measured")
    deltas = {
        (r.layer, r.expert): Fraction(int(r.a1), int(r.a1 + r.d1)) - Fraction(int(r.a2), int(r.a2 + r.d2))
        for r in counts.itertuples()
    }
    for layer in counts.layer.unique():
        rows = counts[counts.layer == layer]
        assert rows.a1.sum() == k * (rows.a1 + rows.d1).iloc[0]
        assert sum(delta for (at, _), delta in deltas.items() if at == layer) == 0
    # The paper's steps with a pandas sort, ties broken by layer and expert.
    frame = pd.DataFrame([(*named, delta, abs(delta)) for named, delta in deltas.items()], columns=list("ledm"))
    frame = frame.sort_values(["m", "l", "e"], ascending=[False, True, True])
    sign = -1 if reverse else 1
    named = [(int(row.l), int(row.e), sign * row.d) for row in frame.itertuples()]
    positive = [(layer, e) for layer, e, d in named if d > 0]
    negative = [(layer, e) for layer, e, d in named if d < 0]
    shuffled = counts.sample(frac=1, random_state=random.randint(0, 99))  # type: ignore[attr-defined]
    ranking = rank(shuffled, reverse=reverse)
    top_k = dict.fromkeys(map(int, counts.layer.unique()), k)
    if n_pos > len(positive) or n_neg > len(negative):
        with pytest.raises(UserError):
            ranking.select(n_pos, n_neg, top_k, None)
        return
    kept: list[tuple[int, int]] = []
    for layer, e in positive[:n_pos]:
        if sum(at == layer for at, _ in kept) < k:
            kept.append((layer, e))
    chosen = ranking.select(n_pos, n_neg, top_k, None)
    assert set(chosen.activate) == set(kept) and set(chosen.deactivate) == set(negative[:n_neg])
    assert set(chosen.dropped) == set(positive[:n_pos]) - set(kept)
