"""RASA's recipe: the sections it has, and what does not go together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.recipe.errors import at_key
from trainer.recipe.schema import Recipe
from trainer.recipe.sections import (
    ConsistencySection,
    ControlledEvaluateSection,
    DetectSection,
    ExportSection,
    RepairSection,
    ScheduleSection,
)
from trainer.recipe.steer import SteerSection


class RasaEvaluateSection(ControlledEvaluateSection):
    attention_control: bool = Field(
        False, description="also train attention alone (as repair.attention says, or all of it), to compare with"
    )
    steering_baseline: bool = Field(
        False, description="also measure the original model steered as section steer says, to compare with"
    )


class RasaRecipe(Recipe):
    needed_data = ("harmful", "jailbreaks", "benign", "borderline")

    method: Literal["rasa"] = Field("rasa", description="repair of the safety-critical experts")
    detect: DetectSection = Field(default_factory=DetectSection)
    repair: RepairSection = Field(default_factory=RepairSection)
    consistency: ConsistencySection = Field(default_factory=ConsistencySection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    steer: SteerSection = Field(default_factory=SteerSection)
    evaluate: RasaEvaluateSection = Field(default_factory=RasaEvaluateSection)
    export: ExportSection = Field(default_factory=ExportSection)

    @property
    def training(self) -> list[tuple[int, Literal["repair", "consistency"]]]:
        """(round, stage) in the order they run."""
        kinds = [kind for kind in self.schedule.order if kind != "consistency" or self.consistency.enabled]
        return [(round_, kind) for round_ in range(1, self.schedule.rounds + 1) for kind in kinds]

    @property
    def trains_routers(self) -> bool:
        """Whether a stage of the schedule may move routers."""
        kinds = {kind for _, kind in self.training}
        everywhere = "repair" in kinds and (self.repair.train_gates or self.repair.scope == "full")
        return everywhere or "consistency" in kinds

    @model_validator(mode="after")
    def _shared_experts_train_with_experts(self) -> RasaRecipe:
        if self.repair.scope == "attention" and self.detect.shared_experts:
            raise at_key("detect.shared_experts", "found true, but repair.scope is attention: no expert trains")
        return self

    @model_validator(mode="after")
    def _fits_quantised_layers(self) -> RasaRecipe:
        """Refuse what needs the gradient of a frozen tensor, or would keep every dequantised one in memory."""
        if self.model.quantization is None:
            return self
        if self.repair.scope == "full":
            raise at_key("repair.scope", "found 'full', which trains every layer; quantised ones cannot be trained")
        if self.detect.score == "saliency":
            allowed = "aad, risk_difference, gate_mass"
            raise at_key(
                "detect.score", f"found 'saliency', which needs gradients of quantised tensors; allowed: {allowed}"
            )
        sections = {"repair": self.repair, "consistency": self.consistency}
        for name in dict.fromkeys(kind for _, kind in self.training):
            given = sections[name].given_arguments
            if not any(given.get(key) for key in ("gradient_checkpointing", "activation_checkpointing")):
                raise at_key(
                    f"{name}.gradient_checkpointing",
                    "expected true under model.quantization: the backward pass would wait with every layer "
                    "dequantised",
                )
        return self


RECIPE = RasaRecipe
