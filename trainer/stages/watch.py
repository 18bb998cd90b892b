"""What every training stage has in common: defaults, a progress bar, and stopping at a non-finite loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback
from transformers.training_args import TrainingArguments

from data_prep.errors import UserError
from trainer.console import progress
from trainer.moe.trained import Trained
from trainer.run_files import save_tensors

# transformers 5.23 renamed the switch; the old name warns there and is all that older releases know.
OLD_CHECKPOINTING, NEW_CHECKPOINTING = "gradient_checkpointing", "activation_checkpointing"


@dataclass(frozen=True)
class StageResult:
    """Outcome of a stage: the trainer's log history and how many parameters trained, of how many."""

    log: list[dict[str, float]]
    trained_parameters: int
    total_parameters: int


def arguments(given: dict[str, Any], defaults: dict[str, Any], output_dir: Path, seed: int) -> dict[str, Any]:
    """Keyword arguments for a trainer's arguments class: the recipe's over the stage's over the project's own.

    Checkpointing is ours (transformers' own resume does not restore fused experts, huggingface/transformers#48805),
    and columns are kept because rows carry spans that no model signature names.
    """
    own: dict[str, Any] = {
        "output_dir": str(output_dir),
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": seed,
        "logging_steps": 10,
        # Mixed precision is decided by the model's own dtype; TRL would switch autocast on by default.
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    chosen = {**own, **defaults, **given}
    checkpointing = [chosen.pop(name, None) for name in (OLD_CHECKPOINTING, NEW_CHECKPOINTING)]
    details = [chosen.pop(f"{name}_kwargs", None) for name in (OLD_CHECKPOINTING, NEW_CHECKPOINTING)]
    name = NEW_CHECKPOINTING if hasattr(TrainingArguments, NEW_CHECKPOINTING) else OLD_CHECKPOINTING
    chosen[name] = any(checkpointing)  # TRL would switch it on by default
    if chosen[name]:
        # Reentrant checkpointing detaches what hooks capture: routing losses would carry no gradient.
        chosen[f"{name}_kwargs"] = {**(details[0] or {}), **(details[1] or {}), "use_reentrant": False}
    return chosen


class StageBar(TrainerCallback):
    """A progress bar over optimiser steps."""

    def __init__(self, label: str):
        self._label = label
        self._steps: Iterator[int] = iter(())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._steps = progress(state.max_steps, self._label)
        next(self._steps, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self._steps, None)


@contextmanager
def configs_kept(model: PreTrainedModel) -> Iterator[None]:
    """Undo what trainers do to the model's configs, which would otherwise be exported with it.

    transformers' Trainer turns `use_cache` off and aligns special tokens; TRL's SFTTrainer writes the load-balancing
    coefficient. Values are compared by name, one level deep.
    """
    found = [model.config, model.config.get_text_config(), model.generation_config]
    configs = [config for config in found if config is not None]
    before = [dict(vars(config)) for config in configs]
    try:
        yield
    finally:
        for config, values in zip(configs, before, strict=True):
            vars(config).update(values)


def watch(trainer: Trainer, label: str) -> None:
    """Replace the trainer's own printing by one progress bar."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StageBar(label))


class NonFiniteLossError(UserError):
    """Training produced a loss that is not a finite number."""


def stop_unless_finite(loss: Tensor, step: int, trained: Trained, folder: Path, stage: str) -> None:
    """Stop the stage at a loss that is not finite, keeping the weights that were good before this step.

    Raises:
        NonFiniteLossError: says where the weights before the step lie, or that only the stage's start is good.
    """
    if math.isfinite(loss.item()):
        return
    state = trained.state_dict()
    if all(bool(t.isfinite().all()) for t in state.values()):
        save_tensors(folder / "last_good.safetensors", state)
        kept = f"the weights before this step are in {folder / 'last_good.safetensors'}"
    else:
        kept = "weights were already non-finite: the last good ones are those at the start of this stage"
    raise NonFiniteLossError(
        f"{stage}: loss is {loss.item()} at step {step + 1}; stopped, {kept}. "
        f"Lower {stage}.learning_rate or set {stage}.max_grad_norm"
    )


def parameter_counts(model: PreTrainedModel) -> tuple[int, int]:
    """(trainable, all) parameters of a model; the split's copies count as trainable only."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = sum(p.numel() for n, p in model.named_parameters() if ".critical." in n)
    return trainable, sum(p.numel() for p in model.parameters()) - copies
