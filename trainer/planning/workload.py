"""How large a recipe's steps are and how many: rows, positions, optimiser steps, tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from data_prep.errors import UserError
from trainer.recipe.schema import ConsistencySection, Recipe, RepairSection

Training = RepairSection | ConsistencySection

# As the stages set them where a recipe does not.
ROWS = {"repair": 16, "consistency": 8}
MAX_LENGTH = 512
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


@dataclass(frozen=True)
class Steps:
    """What a training stage does at most, all rounds together; `tokens` counts every position of its batches."""

    stage: str
    rows: int
    steps: int
    tokens: int


def argument(section: Training, name: str) -> Any:
    """A trainer's argument: the recipe's, or the default of the arguments class."""
    default = next(f.default for f in fields(TrainingArguments) if f.name == name)
    return section.trainer_args.get(name, default)


def optimiser(section: Training) -> str:
    found = argument(section, "optim")
    return str(getattr(found, "value", found))


def checkpointing(section: Training) -> bool:
    return any(section.trainer_args.get(name) for name in CHECKPOINTING)


def stages(recipe: Recipe) -> list[str]:
    """The stages of a run that differ in memory, in their order; those in `ROWS` train."""
    if recipe.method == "steermoe":
        return ["detect", "evaluate"]
    wanted = [s for s in dict.fromkeys(recipe.schedule.order) if s != "consistency" or recipe.consistency.enabled]
    return ["detect", *wanted, "evaluate"]


def batch_rows(recipe: Recipe, stage: str) -> int:
    """Rows of one training batch on one GPU."""
    rows: int = getattr(recipe, stage).trainer_args.get("per_device_train_batch_size", ROWS[stage])
    return rows


def longest(recipe: Recipe) -> int:
    """Positions of the longest row: `repair.max_length`, which the other stages' texts are taken to keep to.

    Raises:
        UserError: no limit is set.
    """
    length = recipe.repair.trainer_args.get("max_length", MAX_LENGTH)
    if length is None:
        raise UserError("repair.max_length: found null; a plan needs the length of the longest row, such as 512")
    return int(length)


def row_counts(recipe: Recipe) -> tuple[int, int]:
    """Repair rows with a refusal and rows to retain, from the most pairs that detection may keep."""
    pairs, mix = recipe.detect.max_pairs, recipe.repair
    around = round(mix.recombined * pairs) + round(mix.robust * pairs)
    retained = round(mix.wrapped_benign * (pairs + around))
    retained += round(mix.plain_benign * pairs) + round(mix.borderline * pairs)
    return pairs + around + round(mix.anchors * pairs), retained


def retained_rows(recipe: Recipe) -> int:
    """Rows of a repair batch that are compared with the original model, as many as the mix has on average."""
    section = recipe.repair
    if section.retain_loss != "kl" or section.retain_weight == 0:
        return 0
    refused, retained = row_counts(recipe)
    return math.ceil(batch_rows(recipe, "repair") * retained / (refused + retained))


def steps(recipe: Recipe, processes: int) -> list[Steps]:
    """Optimiser steps and tokens of the training stages."""
    rows = {"repair": sum(row_counts(recipe)), "consistency": recipe.detect.max_pairs}
    passes = {"repair": 1, "consistency": 3}
    found = []
    for stage in (stage for stage in stages(recipe) if stage in ROWS):
        section, batch = getattr(recipe, stage), batch_rows(recipe, stage)
        accumulation, most = argument(section, "gradient_accumulation_steps"), argument(section, "max_steps")
        per_epoch = math.ceil(math.ceil(rows[stage] / (batch * processes)) / accumulation)
        number = most if most > 0 else math.ceil(argument(section, "num_train_epochs") * per_epoch)
        number *= recipe.schedule.rounds
        tokens = number * batch * accumulation * processes * longest(recipe) * passes[stage]
        found.append(Steps(stage, rows[stage], number, tokens))
    return found


def smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe, tuple[str, ...]]]:
    """What saves memory, in words, each with the changed recipe and the stages whose steps change."""
    trains = [stage for stage in stages(recipe) if stage in ROWS]
    for stage in trains:
        rows = batch_rows(recipe, stage)
        if rows > 1:
            section, key = getattr(recipe, stage), "per_device_train_batch_size"
            less = section.model_copy()
            less.__pydantic_extra__ = {**section.trainer_args, key: 1}
            words = f"{stage}.{key}=1 (with gradient_accumulation_steps={rows})"
            yield words, recipe.model_copy(update={stage: less}), (stage,)
    if "repair" in trains and recipe.repair.scope == "experts":
        if recipe.repair.lora_rank is None:
            lora = recipe.repair.model_copy(update={"lora_rank": 8})
            yield "repair.lora_rank=8", recipe.model_copy(update={"repair": lora}), tuple(trains)
        if recipe.evaluate.random_control:
            without = recipe.evaluate.model_copy(update={"random_control": False})
            yield "evaluate.random_control=false", recipe.model_copy(update={"evaluate": without}), ()
    if recipe.evaluate.batch_size > 8:
        fewer = recipe.evaluate.model_copy(update={"batch_size": 8})
        yield "evaluate.batch_size=8", recipe.model_copy(update={"evaluate": fewer}), ("detect", "evaluate")
