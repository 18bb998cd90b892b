"""What saves memory in any method's recipe: each in words, with the changed recipe and the stages it changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from trainer.planning.workload import BATCH, batch_rows
from trainer.recipe.schema import Recipe

R = TypeVar("R", bound=Recipe)
Change = tuple[str, R, tuple[str, ...]]
FEW_PROMPTS = 8


def single_rows(recipe: R, stages: Iterable[str]) -> Iterator[Change[R]]:
    """Batches of one row; a stage that trains is named like its section."""
    for name in stages:
        section = getattr(recipe, name)
        rows = batch_rows(section)
        if rows > 1:
            less = section.model_copy()
            less.__pydantic_extra__ = {**section.given_arguments, BATCH: 1}
            words = f"{name}.{BATCH}=1 (with gradient_accumulation_steps={rows})"
            yield words, recipe.model_copy(update={name: less}), (name,)


def fewer_prompts(recipe: R, stages: tuple[str, ...]) -> Iterator[Change[R]]:
    """Fewer prompts at a time for `stages`, which ask the model."""
    if recipe.evaluate.batch_size > FEW_PROMPTS:
        fewer = recipe.evaluate.model_copy(update={"batch_size": FEW_PROMPTS})
        yield f"evaluate.batch_size={FEW_PROMPTS}", recipe.model_copy(update={"evaluate": fewer}), stages
