"""The recipe of LoMC: what is looked for, what may be corrected, how strongly, and what safety it may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.recipe.errors import at_key
from trainer.recipe.schema import Recipe
from trainer.recipe.section import Count, Section, Share
from trainer.recipe.sections import EvaluateSection, ExportSection, RepliesSection

Strength = Annotated[float, Field(gt=0, le=2)]


class LomcDetectSection(RepliesSection):
    """Which prompts are wrongly refused, along what directions, and by which writers."""

    max_prompts: Count = Field(240, description="training prompts of each kind that are asked")
    tokens: Literal["prompt", "response", "both"] = Field("both", description="positions whose experts are counted")
    score: Literal["aad", "risk_difference", "gate_mass"] = Field(
        "aad", description="what experts are ranked by: wrongly refused prompts against answered ones"
    )
    top_k: Count | Share = Field(0.125, description="most experts, or share of all routed experts (0 < share < 1)")
    layers: Count | None = Field(None, description="most layers; null: as many as the experts lie in")
    kinds: list[Literal["experts", "shared", "mixer"]] = Field(
        ["experts"],
        min_length=1,
        description="what is corrected: routed experts, shared experts (and dense MLPs), token mixers (attention)",
    )
    clustering: Literal["kmeans", "som"] = Field(
        "kmeans", description="how wrongly refused prompts are grouped; som: a self-organising map of 4 x 4"
    )
    prototypes: list[Count] = Field(
        [1, 2, 4], min_length=1, description="numbers of k-means clusters that are tried, each at every strength"
    )

    protected: Count = Field(
        8, description="clusters of refused harmful prompts, and of answered ones, that directions are orthogonal to"
    )

    @model_validator(mode="after")
    def _each_once(self) -> LomcDetectSection:
        if len(set(self.kinds)) < len(self.kinds):
            raise at_key("kinds", f"found {self.kinds}, expected each kind once")
        if self.clustering == "som" and "prototypes" in self.model_fields_set:
            raise at_key("prototypes", "not read by detect.clustering som, whose map has 16 neurons")
        return self


class CorrectSection(Section):
    """How strongly, and within what bounds; measured on training prompts that no direction was fitted on."""

    strengths: list[Strength] = Field(
        [0.25, 0.5, 0.75, 1.0], min_length=1, description="strengths that are tried; 1 takes the direction away"
    )
    max_kl: float = Field(
        0.05, gt=0, le=100, description="most KL to the original model on its harmless replies, nats"
    )
    max_loss: float = Field(
        0.01,
        ge=0,
        le=1,
        description="most that harmful refusal or answers to harmless prompts may fall on held-out prompts, and "
        "harmful refusal fall or attack success rise on the test prompts for anything to be written",
    )
    rounds: Count = Field(
        2, description="most corrections, one after the other, each of what the ones before it leave refused"
    )
    held_out: float = Field(0.5, gt=0, lt=1, description="share of the prompts that strengths are chosen on")


class LomcEvaluateSection(EvaluateSection):
    ablation: bool = Field(False, description="also measure the support alone and one direction, there or everywhere")


class LomcRecipe(Recipe):
    needed_data = ("harmful", "jailbreaks", "benign", "borderline")

    method: Literal["lomc"] = Field(description="correction of wrong refusals inside a compact support")
    detect: LomcDetectSection = Field(default_factory=LomcDetectSection)
    correct: CorrectSection = Field(default_factory=CorrectSection)
    evaluate: LomcEvaluateSection = Field(default_factory=LomcEvaluateSection)
    export: ExportSection = Field(default_factory=ExportSection)


RECIPE = LomcRecipe
