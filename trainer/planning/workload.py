"""How large a training stage's steps are and how many: rows, optimiser steps, tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from trainer.planning.planned import PlannedStage
from trainer.recipe.section import TrainerSection

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
BATCH = "per_device_train_batch_size"


@dataclass(frozen=True)
class Steps:
    """What a training stage does at most, all rounds together; `tokens` counts every position of its batches."""

    stage: str
    rows: int
    steps: int
    tokens: int


def argument(section: TrainerSection, name: str) -> Any:
    """A trainer's argument: the section's, or the default of the arguments class."""
    default = next(f.default for f in fields(TrainingArguments) if f.name == name)
    return section.trainer_arguments.get(name, default)


def optimiser(section: TrainerSection) -> str:
    found = argument(section, "optim")
    return str(getattr(found, "value", found))


def checkpointing(section: TrainerSection) -> bool:
    return any(section.trainer_arguments.get(name) for name in CHECKPOINTING)


def batch_rows(section: TrainerSection) -> int:
    """Rows of one training batch on one GPU."""
    return int(argument(section, BATCH))


def steps(stages: Iterable[PlannedStage], processes: int) -> list[Steps]:
    """Optimiser steps and tokens of the stages that train."""
    found = []
    for stage in stages:
        training = stage.training
        if training is None:
            continue
        section, batch = training.section, batch_rows(training.section)
        accumulation, most = argument(section, "gradient_accumulation_steps"), argument(section, "max_steps")
        per_epoch = math.ceil(math.ceil(training.rows / (batch * processes)) / accumulation)
        number = most if most > 0 else math.ceil(argument(section, "num_train_epochs") * per_epoch)
        number *= training.rounds
        tokens = number * batch * accumulation * processes * training.length * training.passes
        found.append(Steps(stage.name, training.rows, number, tokens))
    return found
