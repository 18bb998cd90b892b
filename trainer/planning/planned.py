"""What a method tells the planner: the stages of a run, how each holds the model and steps, what the edit may change.

A method's `plan.py` makes its `Planned` from its recipe. Nothing is loaded: models are on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint
from trainer.moe.trainable import TrainableModel
from trainer.recipe.section import TrainerSection

Held = Backbone | TrainableModel
Hold = Callable[[Backbone], Held]
"""Makes of the stock model what a stage holds. Afterwards exactly those parameters require gradients that get them."""
Step = Callable[[Any], Tensor | None]
"""One step on what `Hold` made, at its longest: the loss, None where there is no backward pass (`planning/steps.py`).
It may run on a model of fewer decoder layers than `Hold` saw."""


def stock(backbone: Backbone) -> Backbone:
    """The model as loaded, without gradients."""
    backbone.model.requires_grad_(False)
    return backbone


@dataclass(frozen=True)
class Training:
    """What a stage trains on. `rows`: of an epoch, at most. `length`: positions of the longest row.

    `passes`: how many texts a row has. `rounds`: how often the run goes through the stage.
    """

    section: TrainerSection
    rows: int
    length: int
    rounds: int
    passes: int = 1


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run. One that does not train has no `training`.

    `copies`: whole stock models that the run holds beside the one of the stage; `copies_where_split`: the same under
    engines that split weights. A second model that `hold` itself makes, as the original, is counted from there.
    """

    name: str
    step: Step
    hold: Hold = stock
    training: Training | None = None
    copies: int = 0
    copies_where_split: int = 0
    needs_whole_model: bool = False
    """Engines that split weights cannot run the stage."""


@dataclass(frozen=True)
class Saving:
    """What saves memory: in words, the plan with it, and the names of the stages whose steps it changes."""

    words: str
    planned: Planned
    changed: tuple[str, ...]


class Planned(Protocol):
    """A run of a method as the planner sees it."""

    def stages(self) -> Sequence[PlannedStage]:
        """Those that differ in memory, in their order; the last one holds the edited model.

        Raises:
            UserError: a key of the recipe leaves open how large a step is.
        """

    def footprint(self, backbone: Backbone) -> Footprint:
        """What the run may change in a stock model, which experts are not known yet.

        Raises:
            UserError: the recipe asks for what this model does not have.
        """

    def savings(self) -> Iterable[Saving]:
        """What may be changed in the recipe, where nothing fits."""
