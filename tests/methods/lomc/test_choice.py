"""Which correction is chosen of those tried on held-out prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.methods.lomc import correct
from trainer.methods.lomc.correct import Tried, chosen


def choice(monkeypatch: pytest.MonkeyPatch, table: dict[tuple[int, float], tuple[float, bool]]) -> Tried | None:
    """Of corrections (prototypes, strength) -> (wrong refusals, within the bounds); nothing refuses .5 wrongly."""

    def tried(_experiment: Any, _edit: Any, _held: Any, prototypes: int, strength: float) -> Tried:
        over_refusal, within = table.get((prototypes, strength), (0.5, True))
        return Tried(prototypes, strength, over_refusal, 1.0, 1.0, 0.0, within)

    monkeypatch.setattr(correct, "_tried", tried)
    strengths = sorted({strength for _, strength in table})
    experiment: Any = SimpleNamespace(recipe=SimpleNamespace(correct=SimpleNamespace(strengths=strengths)))
    edits: Any = dict.fromkeys(sorted({number for number, _ in table}))
    best, every = chosen(experiment, edits, None)  # type: ignore[arg-type]
    assert [one.strength for one in every] == [0.0, *strengths * len(edits)], "nothing first, then all"
    return best


def test_the_fewest_wrong_refusals_win_whatever_their_number_of_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {(1, 1.0): (0.3, True), (1, 2.0): (0.2, True), (4, 1.0): (0.1, True), (4, 2.0): (0.4, True)}
    best = choice(monkeypatch, table)
    assert best is not None and (best.prototypes, best.strength) == (4, 1.0)


def test_of_equals_the_weakest_and_then_the_fewest_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {(1, 1.0): (0.1, True), (1, 2.0): (0.1, True), (4, 1.0): (0.1, True), (4, 2.0): (0.1, True)}
    best = choice(monkeypatch, table)
    assert best is not None and (best.prototypes, best.strength) == (1, 1.0)


def test_beyond_the_bounds_nothing_counts_and_nothing_gained_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    best = choice(monkeypatch, {(1, 1.0): (0.2, True), (2, 1.0): (0.0, False)})
    assert best is not None and best.prototypes == 1
    assert choice(monkeypatch, {(1, 1.0): (0.5, True), (2, 1.0): (0.0, False)}) is None
