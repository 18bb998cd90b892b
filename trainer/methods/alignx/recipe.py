"""The recipe of AlignX: the axes and how each is judged, their adapters, the routing features, the head, inference."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from data_prep.config import AxisSource
from trainer.methods.alignx.head_section import HeadSection
from trainer.recipe.errors import at_key
from trainer.recipe.schema import Recipe
from trainer.recipe.section import Count, Section, TrainerSection
from trainer.recipe.sections import EvaluateSection, ExportSection

Leaf = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
REASONING = "Think about what is asked before you answer."
RESERVED = ("base", "joint", "static", "uniform")
"""Names that figures of a run have beside those of its axes."""


class AxisSection(Section):
    """One axis: prompts with the answers that are right there, what is injected before them, who judges replies."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9_]*$", max_length=40, description="small letters, digits and '_', from a letter on"
    )
    data: AxisSource = Field(description="where prompts and answers come from, and how many go where")
    prefix: str | None = Field(
        None, min_length=1, description="text before the prompts of the injected pass; null: a sentence with the name"
    )
    judge: Literal["answer", "closer", "refused", "complied"] = Field(
        "answer",
        description="right: a reply that holds the row's answer; that is closer to it than to `data.wrong`; or that "
        "evaluate.judge calls refused, or complied",
    )

    @property
    def injected(self) -> str:
        """The prefix of the injected pass."""
        return self.prefix if self.prefix is not None else f"{REASONING} Be {self.name.replace('_', ' ')}."

    @model_validator(mode="after")
    def _says_something(self) -> AxisSection:
        if self.prefix is not None and not self.prefix.strip():
            raise at_key("prefix", f"found {self.prefix!r}, expected a text, or null for the default")
        if self.judge == "closer" and self.data.wrong is None:
            raise at_key("data.wrong", "missing, and judge closer compares with it; expected a column")
        return self


class AdaptersSection(TrainerSection):
    """Stage 1: one LoRA adapter per axis, trained on plain, then on injected prompts. Rank and scale as published."""

    arguments_class = "SFTConfig"
    trainer_defaults = {
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "weight_decay": 0.01,
        "max_length": 512,
    }

    r: Annotated[int, Field(ge=1, le=8192)] = Field(64, description="rank of an adapter")
    alpha: float = Field(32.0, gt=0, le=1e6, description="its scale is alpha / r")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of an adapter's inputs dropped in training")
    targets: list[Leaf] = Field(
        ["q_proj", "v_proj"], min_length=1, description="names of the linear layers that have adapters"
    )
    order: Literal["parallel", "chain"] = Field(
        "parallel", description="parallel: each from the base; chain: each from the axis before"
    )
    passes: list[Literal["plain", "injected"]] = Field(
        ["plain", "injected"], min_length=1, description="passes over an axis' rows, on the same adapter"
    )

    @model_validator(mode="after")
    def _each_once(self) -> AdaptersSection:
        for key in ("passes", "targets"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise at_key(key, f"found {getattr(self, key)}, expected each once")
        return self


class FeaturesSection(Section):
    """What the head routes by: hidden states of the base and under each adapter."""

    layer: int | None = Field(None, ge=0, le=65535, description="decoder layer that is read; null: the last one")
    position: Literal["last", "mean"] = Field("last", description="last prompt token, or mean over the prompt")
    batch_size: Count = Field(32, description="prompts per forward")


class InferenceSection(Section):
    mode: Literal["weights", "top1", "hidden"] = Field(
        "weights",
        description="weights: adapters scaled by alpha; top1: the largest alone; hidden: last hidden states mixed",
    )


class AlignxEvaluateSection(EvaluateSection):
    baselines: bool = Field(True, description="also train and measure joint SFT, and measure merges and head variants")
    cost: bool = Field(
        False, description="also time every mode beside the base and a mixture of three MLPs, which is built for it"
    )


class AlignxRecipe(Recipe):
    takes_dense: ClassVar[bool] = True

    method: Literal["alignx"] = Field(description="axis adapters under a calibrated mixture")
    axes: list[AxisSection] = Field(min_length=1, description="a list of two or more axes")
    adapters: AdaptersSection = Field(default_factory=AdaptersSection)
    features: FeaturesSection = Field(default_factory=FeaturesSection)
    head: HeadSection = Field(default_factory=HeadSection)
    inference: InferenceSection = Field(default_factory=InferenceSection)
    evaluate: AlignxEvaluateSection = Field(default_factory=AlignxEvaluateSection)
    export: ExportSection = Field(default_factory=ExportSection)

    @model_validator(mode="after")
    def _axes_that_can_be_told_apart(self) -> AlignxRecipe:
        names = [axis.name for axis in self.axes]
        if len(names) < 2:
            raise at_key("axes", f"found one axis, {names[0]!r}; expected two or more: one needs no routing")
        twice = [name for name, n in Counter(names).items() if n > 1]
        if twice:
            raise at_key("axes", f"found two axes of the name {twice[0]!r}; expected each name once")
        taken = [name for name in names if name in RESERVED]
        if taken:
            raise at_key("axes", f"found an axis named {taken[0]!r}; not allowed: {', '.join(RESERVED)}")
        if self.model.quantization is not None:
            raise at_key(
                "model.quantization", "found a value; method alignx adapts weights as they are; allowed: null"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the axes, in order."""
        return tuple(axis.name for axis in self.axes)


RECIPE = AlignxRecipe
