"""Which correction is chosen of those tried on held-out prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.methods.lomc import correct
from trainer.methods.lomc.correct import Tried, chosen

N = 100


def choice(monkeypatch: pytest.MonkeyPatch, table: dict[tuple[int, float], tuple[int, float, bool]]) -> Tried | None:
    """Of corrections (prototypes, strength) -> (of 100 prompts those wrongly refused, the first ones; KL; within the
    bounds); nothing refuses 50 wrongly.
    """

    def tried(_experiment: Any, _edit: Any, _held: Any, prototypes: int, strength: float) -> Tried:
        refused, kl, within = table[prototypes, strength] if prototypes else (50, 0.0, True)
        refuses = tuple(place < refused for place in range(N))
        return Tried(prototypes, strength, refused / N, 1.0, 1.0, kl, within, refuses)

    monkeypatch.setattr(correct, "_tried", tried)
    strengths = sorted({strength for _, strength in table})
    experiment: Any = SimpleNamespace(recipe=SimpleNamespace(correct=SimpleNamespace(strengths=strengths)))
    edits: Any = dict.fromkeys(sorted({number for number, _ in table}))
    best, every = chosen(experiment, edits, None)  # type: ignore[arg-type]
    assert [one.strength for one in every] == [0.0, *strengths * len(edits)], "nothing first, then all"
    return best


def test_the_fewest_wrong_refusals_win_whatever_it_costs_within_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        (1, 1.0): (30, 0.001, True),
        (1, 2.0): (20, 0.002, True),
        (4, 1.0): (10, 0.04, True),
        (4, 2.0): (40, 0.0, True),
    }
    best = choice(monkeypatch, table)
    assert best is not None and (best.prototypes, best.strength) == (4, 1.0)


def test_of_those_that_cannot_be_told_apart_the_gentlest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {(1, 1.0): (8, 0.03, True), (1, 2.0): (11, 0.01, True), (4, 1.0): (16, 0.001, True)}
    best = choice(monkeypatch, table | {(4, 2.0): (50, 0.0, True)})
    assert best is not None and (best.prototypes, best.strength) == (1, 2.0), (
        "3 more of 100: p = .25; 8 more: p = .008"
    )


def test_beyond_the_bounds_nothing_counts_and_nothing_gained_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    best = choice(monkeypatch, {(1, 1.0): (20, 0.01, True), (2, 1.0): (0, 0.01, False)})
    assert best is not None and best.prototypes == 1
    assert choice(monkeypatch, {(1, 1.0): (50, 0.0, True), (2, 1.0): (0, 0.0, False)}) is None
