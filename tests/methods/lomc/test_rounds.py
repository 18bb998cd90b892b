"""How many corrections follow the first, on what they are fitted, and that they compose."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.methods.lomc import rounds
from trainer.methods.lomc.correct import Tried
from trainer.methods.lomc.groups import Groups, Halves
from trainer.methods.lomc.identify import Located, directions_of
from trainer.moe.rank_one import Correction, Unit

UNITS = (Unit(0, "mixer"), Unit(1, "mixer"))
FIRST = {"prototypes": 1, "strength": 1.0}
Found = dict[int, dict[int, torch.Tensor]]


def axis(place: int) -> torch.Tensor:
    return torch.eye(4)[place]


def later(monkeypatch: pytest.MonkeyPatch, fits: list[Found], helps: list[bool], most: int) -> list[rounds.Round]:
    """Rounds after the first. `fits`: what a direction search finds in each of them; `helps`: whether a correction
    along it is within the bounds and helps.
    """
    under: list[int] = []
    halves = Halves(Groups([], [], []), Groups([], [], []))
    located = Located({1: {0: axis(0), 1: axis(0)}}, {}, [], UNITS, [], {})

    def corrected(_backbone: Any, _writers: Any, corrections: tuple[Correction, ...]) -> Any:
        under.append(len(corrections))
        return nullcontext()

    def chosen(_experiment: Any, edits: Any, held: Groups) -> tuple[Tried | None, list[Tried]]:
        assert held is halves.held, "bounds are held against the original's prompts, not those that are left"
        one = Tried(next(iter(edits)), 0.5, 0.1, 1.0, 1.0, 0.0, True, ())
        return (one if helps[len(under) - 1] else None), [one]

    monkeypatch.setattr(rounds, "corrected", corrected)
    monkeypatch.setattr(rounds, "chosen", chosen)
    monkeypatch.setattr(rounds, "refused_still", lambda _experiment, of: of)
    monkeypatch.setattr(rounds, "directions_of", lambda *_: fits[len(under) - 1])

    def step(_name: str, make: Any, _kept: Any, **_: Any) -> Any:
        return SimpleNamespace(value=make())

    recipe = SimpleNamespace(correct=SimpleNamespace(rounds=most))
    experiment: Any = SimpleNamespace(recipe=recipe, folder=Path("run"), backbone=None, step=step)
    of: Any = SimpleNamespace
    found = rounds.later_rounds(experiment, of(value=located), of(value=halves), of(value={"chosen": FIRST}))
    assert under == list(range(1, len(under) + 1)), "each is fitted under all the corrections before it"
    made: list[rounds.Round] = found.value
    corrections = rounds.all_rounds(located, FIRST, made)
    assert [one.strength for one in corrections] == [1.0, *(one.strength for one in made)]
    return made


def test_rounds_go_on_to_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[Found] = [{1: {0: axis(1)}}, {2: {1: axis(2)}}]
    made = later(monkeypatch, fits, [True, True], 3)
    assert [one.prototypes for one in made] == [1, 2]
    assert later(monkeypatch, fits, [True, True], 1) == []


def test_rounds_end_where_nothing_is_left_or_nothing_more_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(later(monkeypatch, [{1: {0: axis(1)}}, {}], [True, True], 4)) == 1
    assert later(monkeypatch, [{1: {0: axis(1)}}], [False], 4) == []


def test_no_direction_is_fitted_where_a_group_has_no_prompts_left() -> None:
    asked: Any = object()
    some, none = Groups([asked], [asked], [asked]), Groups([], [asked], [asked])
    experiment: Any = None
    assert directions_of(experiment, none, some) == {} and directions_of(experiment, some, none) == {}


def test_a_layer_without_a_direction_of_its_own_is_left_out_of_that_round_alone() -> None:
    located = Located({1: {0: axis(0), 1: axis(0)}}, {}, [], UNITS, [], {})
    first, second = rounds.all_rounds(located, FIRST, [rounds.Round(1, 0.5, 3, {1: axis(1)}, [])])
    assert first.units == UNITS and second.units == UNITS[1:]
