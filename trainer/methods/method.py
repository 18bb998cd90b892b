"""What a method is to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from trainer.pipeline.experiment import Opened
    from trainer.planning.planned import Planned
    from trainer.recipe.schema import Recipe
    from trainer.reporting.artefacts import Artefacts
    from trainer.reporting.method_report import MethodReport

Report = Callable[["Artefacts"], "MethodReport"]


class Method(Protocol):
    """One way to make a model safer, from the base model to its evidence."""

    def run(self, opened: Opened[Any]) -> None:
        """Everything, from the base model to `evaluation.json` and the report; what is done already is kept."""

    def detect(self, opened: Opened[Any]) -> None:
        """Up to what the method would act on, and no further."""

    def export(self, opened: Opened[Any]) -> None:
        """Write the checkpoint of a run again. `UserError` for a method that changes no weight."""

    def planned(self, recipe: Recipe) -> Planned:
        """What a run holds, trains and may change, for the planner; nothing is loaded."""


class Answer(Protocol):
    """What a mixture says to one prompt, and how much of each of its parts spoke."""

    @property
    def alpha(self) -> dict[str, float]: ...
    @property
    def text(self) -> str: ...


@runtime_checkable
class MixingMethod(Protocol):
    """A method whose result is several adapters and what mixes them, beside an untouched base."""

    def merge(self, opened: Opened[Any]) -> None:
        """Write the static merge of a run's adapters as a stock checkpoint, `<run>/model`."""

    def generate(
        self, folder: Path, prompts: Sequence[str], mode: str | None, max_new_tokens: int, batch_size: int
    ) -> Sequence[Answer]:
        """Replies of a finished run's mixture; `mode` None: the recipe's."""
