"""LoMC, step 4: corrections of what the corrections before them leave refused, in the same support and within the same
bounds.

One direction per layer need not hold all reasons of a refusal. Under the first correction the prompts that are still
refused are found, and directions are fitted on their states anew. Corrections compose in their order
(`moe/rank_one.py`), and every bound is held against the original model, so that they are bounds on all of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file

from trainer.methods.lomc.correct import Edit, chosen, refused_still, table_of
from trainer.methods.lomc.groups import Halves
from trainer.methods.lomc.identify import Directions, Located, directions_of
from trainer.methods.lomc.recipe import LomcRecipe
from trainer.moe.rank_one import Correction, corrected
from trainer.pipeline.experiment import Experiment, Kept, Step
from trainer.runtime.console import say
from trainer.runtime.files import atomic_write, save_tensors


@dataclass(frozen=True)
class Round:
    """A correction after the first. `directions`: of every layer that has one. `left`: wrongly refused prompts that
    they were fitted on, under the corrections before. `tried`: as in `strength.json`.
    """

    prototypes: int
    strength: float
    left: int
    directions: Directions
    tried: list[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """For `rounds.json` and `evaluation.json`: all but the directions."""
        return {name: getattr(self, name) for name in ("prototypes", "strength", "left", "tried")}


def all_rounds(located: Located, first: dict[str, Any], later: list[Round]) -> tuple[Correction, ...]:
    """The corrections of a run in their order. `first`: what `search` chose."""
    edit = Edit.of(located, first["prototypes"])
    corrections = edit.at(first["strength"])
    for one in later:
        corrections = Edit.after(corrections, located, one.directions).at(one.strength)
    return corrections


def later_rounds(
    experiment: Experiment[LomcRecipe], located: Step[Located], grouped: Step[Halves], found: Step[dict[str, Any]]
) -> Step[list[Round]]:
    """Up to `correct.rounds` corrections, fewer where nothing is left to fit on or nothing more helps."""
    kept = (experiment.folder / "rounds.json", experiment.folder / "rounds.safetensors")

    def make() -> list[Round]:
        later: list[Round] = []
        for number in range(2, experiment.recipe.correct.rounds + 1):
            before = all_rounds(located.value, found.value["chosen"], later)
            one = _round(experiment, located.value, grouped.value, before, number)
            if one is None:
                break
            later.append(one)
        return later

    def write(later: list[Round]) -> None:
        save_tensors(kept[1], {f"{n}.{i}": d for n, one in enumerate(later) for i, d in one.directions.items()})
        atomic_write(kept[0], json.dumps([one.record() for one in later], indent=1))

    def read() -> list[Round]:
        records, held = json.loads(kept[0].read_text(encoding="utf-8")), load_file(kept[1])
        directions: list[Directions] = [{} for _ in records]
        for name, direction_D in held.items():
            at, _, layer = name.partition(".")
            directions[int(at)][int(layer)] = direction_D
        return [Round(directions=found, **record) for found, record in zip(directions, records, strict=True)]

    reads = ["detect", "correct", "evaluate"]
    return experiment.step("rounds", make, Kept(write, lambda: list(kept), read), reads=reads, after=[located, found])


def _round(
    experiment: Experiment[LomcRecipe],
    located: Located,
    halves: Halves,
    before: tuple[Correction, ...],
    number: int,
) -> Round | None:
    with corrected(experiment.backbone, located.writers, before):
        left = Halves(refused_still(experiment, halves.fitted), refused_still(experiment, halves.held))
        now, first = len(left.fitted.wrong), len(halves.fitted.wrong)
        say(f"round {number}: {now} fitted prompts are wrongly refused; before the first correction {first}")
        several = directions_of(experiment, left.fitted, left.held)
    if not several:
        say(f"round {number}: nothing to fit a direction on")
        return None
    edits = {prototypes: Edit.after(before, located, found) for prototypes, found in several.items()}
    best, tried = chosen(experiment, edits, halves.held)
    records = [one.record() for one in tried]
    table_of(records, f"round {number}: corrections on held-out training prompts")
    if best is None:
        say(f"round {number}: nothing more within the bounds")
        return None
    return Round(best.prototypes, best.strength, len(left.fitted.wrong), several[best.prototypes], records)
