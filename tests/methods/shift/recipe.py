"""The recipe of the method of 60 lines that test_third_method.py adds: one attention output moves by a constant."""

from typing import Literal

from pydantic import Field

from trainer.recipe.schema import Recipe
from trainer.recipe.section import Section
from trainer.recipe.sections import ExportSection


class ShiftSection(Section):
    parameter: str = Field("model.layers.1.self_attn.o_proj.weight", description="the tensor that moves")
    by: float = Field(1e-3, description="how far")


class ShiftRecipe(Recipe):
    needed_data = ("harmful", "jailbreaks")
    method: Literal["shift"] = Field(description="one attention output moved by a constant")
    shift: ShiftSection = Field(default_factory=ShiftSection)
    export: ExportSection = Field(default_factory=ExportSection)


RECIPE = ShiftRecipe
