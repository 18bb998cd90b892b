"""Whether the trainer's libraries take a section's settings, asked before any step of a run is begun.

The recipe knows types and bounds. What only the libraries know - an optimiser that is not installed, an argument that
a schedule does not have - would otherwise be said after detection, hours later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig

from data_prep.errors import UserError
from trainer.engines.hf_trainer import forget_arguments
from trainer.recipe.section import TrainerSection
from trainer.training.loop import arguments

CLASSES: dict[str, type[TrainingArguments]] = {"SFTConfig": SFTConfig, "TrainingArguments": TrainingArguments}
STEPS = 8
"""Of the schedule that is made for a try, where the section sets none."""


def check_settings(sections: dict[str, TrainerSection], folder: Path, model: PreTrainedModel) -> None:
    """Make the arguments, the optimiser and the schedule of the training sections, by name, and drop them.

    Raises:
        UserError: a library refuses; names the section and what the library said.
    """
    for name, section in sections.items():
        if not section.given_arguments:
            continue
        try:
            _try(CLASSES[section.arguments_class](**arguments(section, folder, 0, model)))
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            given = ", ".join(f"{key}: {value!r}" for key, value in section.given_arguments.items())
            raise UserError(f"{name}: found {given}, of which {section.arguments_class} says: {said}") from error
        finally:
            forget_arguments()


def _try(config: Any) -> None:
    made, settings = Trainer.get_optimizer_cls_and_kwargs(config)
    optimizer = made([nn.Parameter(torch.zeros(2, 2))], **settings)
    steps = config.max_steps if config.max_steps > 0 else STEPS
    get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        config.get_warmup_steps(steps),
        steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )
    get_reporting_integration_callbacks(config.report_to)
