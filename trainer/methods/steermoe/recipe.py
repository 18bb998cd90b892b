"""SteerMoE's recipe: nothing is trained and no weight changes, so there is nothing to repair, schedule or export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.recipe.errors import at_key
from trainer.recipe.schema import Recipe
from trainer.recipe.sections import ControlledEvaluateSection, PairsSection
from trainer.recipe.steer import SteerSection


class SteermoeRecipe(Recipe):
    method: Literal["steermoe"] = Field(description="steering of behaviour-linked experts at inference")
    detect: PairsSection = Field(default_factory=PairsSection)
    steer: SteerSection = Field(default_factory=SteerSection)
    evaluate: ControlledEvaluateSection = Field(default_factory=ControlledEvaluateSection)

    @model_validator(mode="after")
    def _has_the_data_of_its_contrast(self) -> SteermoeRecipe:
        needed: list[tuple[str, str]] = []
        if self.steer.contrast == "safety" and self.steer.table is None:
            needed.append(("harmful", "steer.contrast safety"))
            if self.steer.unsafe == "own":
                needed.append(("jailbreaks", "steer.contrast safety"))
        if self.steer.gate:
            needed += [("harmful", "steer.gate"), ("benign", "steer.gate")]
        for name, why in needed:
            if getattr(self.data, name) is None:
                raise at_key(f"data.{name}", f"missing, and {why} needs it")
        return self


RECIPE = SteermoeRecipe
