"""Groups are in one part only, whatever they are."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from tests.methods.alignx.head import banks
from trainer.methods.alignx.head.split import split


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=90, max_size=150), st.floats(0.15, 0.6), st.integers(0, 2**31 - 1))
def test_groups_never_lie_in_two_parts(numbers: list[int], held_out: float, seed: int) -> None:
    made = banks.bank(len(numbers))
    made = replace(made, groups_N=[f"g{number}" for number in numbers])
    try:
        parts = split(made, held_out, seed)
    except UserError:
        return
    rows = [parts.fit_R.tolist(), *(half.tolist() for half in parts.halves)]
    assert sorted(row for part in rows for row in part) == list(range(len(numbers)))
    fit, first, second = ({made.groups_N[row] for row in part} for part in rows)
    assert not fit & first and not fit & second and not first & second
    assert all(set(made.labels_N[part].tolist()) == {0, 1, 2} for part in rows)


def test_about_the_share_asked_for_is_held_out_and_the_seed_draws_it() -> None:
    made = banks.bank(300)
    parts = split(made, 0.4, 0)
    assert 110 <= len(parts.held_R) <= 130
    assert parts.fit_R.tolist() == split(made, 0.4, 0).fit_R.tolist() != split(made, 0.4, 1).fit_R.tolist()


def test_an_axis_with_too_few_groups_is_refused() -> None:
    made = banks.bank(90)
    groups = ["one" if label == 1 else f"g{row}" for row, label in enumerate(made.labels_N.tolist())]
    with pytest.raises(UserError, match=r"head.held_out: found 0.4, but axis 'harmless' has 1 groups"):
        split(replace(made, groups_N=groups), 0.4, 0)
