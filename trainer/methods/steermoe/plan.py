"""What a run of SteerMoE holds, for the planner: the model as it is. Nothing trains and no weight changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.methods.steermoe.recipe import SteermoeRecipe
from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint
from trainer.planning import steps
from trainer.planning.planned import Planned, PlannedStage, Saving
from trainer.planning.savings import fewer_prompts
from trainer.recipe.sections import RepairSection

LENGTH: int = RepairSection.trainer_defaults["max_length"]
"""Positions of the longest text. No key limits those of a steering run: as long as rows are by default elsewhere."""


def planned(recipe: SteermoeRecipe) -> Planned:
    return SteermoePlanned(recipe)


@dataclass(frozen=True)
class SteermoePlanned:
    """`planned.Planned` of a SteerMoE recipe."""

    recipe: SteermoeRecipe

    def stages(self) -> list[PlannedStage]:
        # Detection asks for replies in the batches of the evaluation, too.
        rows = self.recipe.evaluate.batch_size
        lengths = {
            "detect": LENGTH + self.recipe.detect.max_new_tokens,
            "evaluate": LENGTH + self.recipe.evaluate.max_new_tokens,
        }
        return [PlannedStage(name, steps.replies(rows, length)) for name, length in lengths.items()]

    def footprint(self, backbone: Backbone) -> Footprint:
        return Footprint()

    def savings(self) -> Iterator[Saving]:
        for words, recipe, changed in fewer_prompts(self.recipe, ("detect", "evaluate")):
            yield Saving(words, SteermoePlanned(recipe), changed)
