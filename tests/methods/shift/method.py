"""A whole method in 60 lines: measure, move one tensor, measure, export, audit, report."""

from dataclasses import dataclass
from typing import Any

import torch

from tests.methods.shift.recipe import ShiftRecipe
from tests.methods.shift.report import report
from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint
from trainer.pipeline import publish
from trainer.pipeline.experiment import Opened
from trainer.pipeline.measure import measure, print_figures
from trainer.planning import steps
from trainer.planning.planned import PlannedStage


class Shift:
    def run(self, opened: Opened[ShiftRecipe]) -> None:
        experiment, recipe = opened.load(), opened.recipe
        before = measure(experiment, "evaluate-before")
        self.edit(experiment.model, recipe)
        after = measure(experiment, "evaluate-after", [before], reads=["shift"])
        audit = publish.export_and_audit(
            experiment,
            recipe.export,
            lambda: experiment.model.cpu(),
            Footprint.of([recipe.shift.parameter]),
            [after],
            reads=["shift"],
        )
        found = {key: audit[key] for key in publish.MOVED}
        evaluation = {"before": before.value, "after": after.value, "diagnostics": found}
        publish.publish(experiment, evaluation, report, lambda written: print_figures(recipe, {"after": after.value}))

    @torch.no_grad()
    def edit(self, model: torch.nn.Module, recipe: ShiftRecipe) -> None:
        model.get_parameter(recipe.shift.parameter).add_(recipe.shift.by)

    def detect(self, opened: Opened[ShiftRecipe]) -> None: ...
    def export(self, opened: Opened[ShiftRecipe]) -> None: ...

    def planned(self, recipe: ShiftRecipe) -> Any:
        return Planned(recipe)


@dataclass(frozen=True)
class Planned:
    recipe: ShiftRecipe

    def stages(self) -> list[PlannedStage]:
        return [PlannedStage("evaluate", steps.replies(self.recipe.evaluate.batch_size, 64))]

    def footprint(self, backbone: Backbone) -> Footprint:
        return Footprint.of([self.recipe.shift.parameter])

    def savings(self) -> list[Any]:
        return []


METHOD = Shift()
