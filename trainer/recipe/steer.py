"""The recipe's `steer` section: which experts SteerMoE forces, how hard, and what it is compared with."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_prep.config import FileName
from trainer.recipe.errors import at_key
from trainer.recipe.section import Count, Section

Strength = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[int, Field(ge=0, le=65536)]


class SweepSection(Section):
    """Values tried one key at a time, the others as the section says; measured on fewer prompts."""

    n_pos: list[Number] = Field([], description="numbers of activated experts")
    n_neg: list[Number] = Field([], description="numbers of deactivated experts")
    strength: list[Strength] = Field([], description="strengths, 0 to 1")
    prompts: Count = Field(40, description="test prompts of each kind that a setting is measured on")


class SteerSection(Section):
    """What SteerMoE does, as a method or as a baseline beside another one."""

    contrast: Literal["safety", "faithfulness", "custom"] = Field(
        "safety", description="safety: refusal or unsafe reply; faithfulness: with or without document; custom: a file"
    )
    pairs: FileName | None = Field(None, description="JSON Lines of pairs, for faithfulness and custom")
    table: FileName | None = Field(None, description="activation counts of another tool instead of counting")
    refusal: str | None = Field(
        None, pattern=r"\S", description="fixed refusal of x1; null: the model's own, of the plain goal"
    )
    unsafe: Literal["own", "answer"] = Field(
        "own", description="x2: the model's own reply to the jailbreak, or the answer column of data.harmful"
    )
    n_pos: Number = Field(5, description="experts activated (A+)")
    n_neg: Number = Field(0, description="experts deactivated (A-)")
    reverse: bool = Field(False, description="swap x1 and x2 after sorting; for custom pairs and tables only")
    per_layer_cap: Count | None = Field(
        None, description="most activated experts of a layer; null: as many as its router chooses"
    )
    strength: Strength = Field(1.0, description="0: untouched, 1: the paper's forcing")
    gate: bool = Field(False, description="steer only where a probe on the last prompt token says harmful")
    sweep: SweepSection = Field(default_factory=SweepSection, description="other numbers and strengths to compare")

    @model_validator(mode="after")
    def _consistent(self) -> "SteerSection":
        if self.contrast != "safety" and self.pairs is None and self.table is None:
            raise at_key("pairs", f"missing; steer.contrast {self.contrast} reads its pairs from a file")
        if self.contrast == "safety" and self.pairs is not None:
            raise at_key("pairs", "not read by steer.contrast safety; its pairs come from data and the model")
        if self.unsafe == "answer" and self.refusal is None:
            raise at_key("refusal", "missing; with steer.unsafe answer the refusal is a fixed sentence")
        if self.reverse and self.contrast == "safety" and self.table is None:
            raise at_key("reverse", "found true; reversing the safety contrast would steer towards unsafe replies")
        if self.n_pos + self.n_neg == 0:
            raise at_key("n_pos", "0, and n_neg too; at least one expert must be steered")
        return self
