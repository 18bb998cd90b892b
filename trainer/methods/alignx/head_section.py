"""The recipe's section of the MoCaE head: which pieces it has, how they are weighed, and how it is fitted.

The values of `latent`, `fractal_weight`, `natural_weight`, `eps`, `batch_size` and `weight_decay` are those that arXiv
2602.07381 reports; what it leaves open is our reading (docs/alignx.md).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.recipe.errors import at_key
from trainer.recipe.section import Count, Section, Share, Weight

Switch = Literal["auto", "on", "off"]
"""auto: as held-out data say."""


class HeadSection(Section):
    latent: Count = Field(256, description="width that hidden states are projected to; the hidden size where smaller")
    gate: bool = Field(True, description="route by learned weights; false: by the calibrators alone")
    fractal: Switch = Field("auto", description="the geometry calibrator; auto: kept where it beats shuffled banks")
    natural: Switch = Field("auto", description="the prototype calibrator; auto: kept where it beats shuffled banks")
    fractal_weight: Weight = Field(0.6, description="weight of the geometry calibrator in the logits")
    natural_weight: Weight = Field(0.4, description="weight of the prototype calibrator in the logits")
    neighbours: Count = Field(16, description="bank rows of an axis whose distance sets the scale of its radii")
    eps: Share = Field(0.05, description="width of a soft count, as share of the bank's scale")
    brier_weight: Weight = Field(1.0, description="weight of the Brier score in the gate's loss")
    entropy_weight: Weight = Field(0.01, description="weight of keeping routing from being sure too early")
    kl_weight: Weight = Field(0.01, description="weight of keeping the mean routing near the axes' shares of the rows")
    epochs: Count = Field(30, description="passes over the bank")
    batch_size: Count = Field(64, description="bank rows per step")
    learning_rate: float = Field(3e-3, gt=0, le=10, description="of AdamW on the gate")
    weight_decay: Weight = Field(0.01, description="of AdamW on the gate")
    held_out: float = Field(
        0.4, gt=0, le=0.6, description="share of the bank that calibrates and measures the head; groups stay together"
    )
    temperature: bool = Field(True, description="fit the temperature on held-out rows; false: 1")
    isotonic: Switch = Field("auto", description="per-axis isotonic maps; auto: kept where held-out figures gain")
    output: Switch = Field("auto", description="output calibration; auto: kept where the held-out loss falls")
    output_epochs: Count = Field(3, description="passes over the cached reply tokens")
    output_batch_size: Count = Field(256, description="reply tokens per step")
    output_learning_rate: float = Field(1e-3, gt=0, le=10, description="of AdamW on the output calibration")

    @model_validator(mode="after")
    def _something_routes(self) -> HeadSection:
        if not self.gate and self.fractal == self.natural == "off":
            raise at_key("gate", "found false with fractal and natural off; allowed: true, or one of the two on")
        return self
