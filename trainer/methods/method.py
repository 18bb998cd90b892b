"""What a method is to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trainer.recipe.schema import Recipe
    from trainer.run.folder import Run

ReportSections = Callable[..., object]


class Method(Protocol):
    """One way to make a model safer, from the base model to its evidence."""

    def run(self, recipe: Recipe, run: Run) -> None: ...
    def detect(self, recipe: Recipe, run: Run) -> None: ...
    def export(self, recipe: Recipe, run: Run) -> None: ...
