"""What every training stage has in common: defaults, progress, saving and stopping, a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback
from transformers.training_args import TrainingArguments

from data_prep.errors import UserError
from trainer.engines.hf_trainer import checkpointing_arguments, engine_arguments, release
from trainer.moe.sharding import engine_runs, size
from trainer.moe.trainable import Trained
from trainer.recipe.section import TrainerSection
from trainer.runtime import signals
from trainer.runtime.console import is_main_process, progress, say
from trainer.runtime.files import save_tensors
from trainer.runtime.processes import any_rank, from_rank_0, world_size
from trainer.training.fitting import RowTable
from trainer.training.moved import fingerprints, moved
from trainer.training.resume import ResumableTrainer, resumable

# transformers 5.23 renamed the switch; the old name warns there and is all that older releases know.
OLD_CHECKPOINTING, NEW_CHECKPOINTING = "gradient_checkpointing", "activation_checkpointing"


@dataclass(frozen=True)
class StageResult:
    """Outcome of a stage: the trainer's log history, how many parameters trained, of how many, and the rows.

    `moved_tensors`: of the `trained_tensors` those that differ from the stage's start by a bit. `rows`: source ->
    what became of its rows (`RowTable.json`). `effect`: what the stage did to routing and refusals, where measured.
    """

    log: list[dict[str, float]]
    trained_parameters: int
    total_parameters: int
    trained_tensors: int
    moved_tensors: int
    rows: dict[str, Any]
    effect: dict[str, Any] = field(default_factory=dict)


def arguments(section: TrainerSection, output_dir: Path, seed: int, model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments for a trainer's arguments class: the section's over the project's own.

    Checkpointing is ours (transformers' own resume does not restore fused experts, huggingface/transformers#48805),
    and columns are kept because rows carry spans that no model signature names.
    """
    own: dict[str, Any] = {
        "output_dir": str(output_dir),
        "save_strategy": "no",  # `SaveAndStop` says when
        "save_steps": 50,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": seed,
        "logging_steps": 10,
        # Mixed precision is decided by the model's own dtype; TRL would switch autocast on by default.
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        **engine_arguments(),
    }
    chosen = {**own, **section.trainer_arguments}
    checkpointing = [chosen.pop(name, None) for name in (OLD_CHECKPOINTING, NEW_CHECKPOINTING)]
    details = [chosen.pop(f"{name}_kwargs", None) for name in (OLD_CHECKPOINTING, NEW_CHECKPOINTING)]
    name = NEW_CHECKPOINTING if hasattr(TrainingArguments, NEW_CHECKPOINTING) else OLD_CHECKPOINTING
    chosen[name] = any(checkpointing)  # TRL would switch it on by default
    if chosen[name]:
        # Reentrant checkpointing detaches what hooks capture: routing losses would carry no gradient.
        own_details = {"use_reentrant": False, **checkpointing_arguments(model)}
        chosen[f"{name}_kwargs"] = {**(details[0] or {}), **(details[1] or {}), **own_details}
    return chosen


class StageBar(TrainerCallback):
    """A progress bar over optimiser steps."""

    def __init__(self, label: str):
        self._label = label
        self._steps: Iterator[int] = iter(())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        label = self._label + (f" from step {state.global_step}" if state.global_step else "")
        self._steps = progress(state.max_steps - state.global_step, label)
        next(self._steps, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self._steps, None)


class SaveAndStop(TrainerCallback):
    """Save every `save_steps` steps, and before stopping when a process was asked to end."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if any_rank(signals.requested()):
            control.should_save = control.should_training_stop = True
        elif state.global_step % max(int(state.save_steps), 1) == 0 and state.global_step < state.max_steps:
            control.should_save = True


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


def train(trainer: ResumableTrainer, label: str, inputs: str, dataset: Dataset, rows: RowTable) -> StageResult:
    """Train a stage to its end, from its newest checkpoint where there is one, and take the engine off the model.

    Args:
        dataset: what the trainer was given, to hold against what it kept of it.
        rows: what became of the rows that the dataset was made of.

    Raises:
        RuntimeError: the trainer dropped or changed rows of its own accord.
        NonFiniteLossError: the loss is not finite.
        Terminated: SIGTERM came; a checkpoint was written.
        UserError: a checkpoint that this engine or number of processes cannot take up, or training moved nothing.
    """
    kept = trainer.train_dataset
    if kept is not dataset and kept.to_dict() != dataset.to_dict():
        raise RuntimeError(f"{label}: the trainer holds {len(kept)} rows, and not the {len(dataset)} it was given")
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StageBar(label))
    trainer.add_callback(SaveAndStop())
    # A last batch that is not full would be filled up differently by every number of processes.
    step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps * world_size()
    trainer.args.dataloader_drop_last = len(dataset) >= step
    left = len(dataset) % step if trainer.args.dataloader_drop_last else 0
    say(
        f"{label}: {len(dataset)} rows, {step} a step"
        + (f"; each epoch leaves out {left}, which fill no step" if left else "")
    )
    trainer.inputs = inputs
    start = resumable(trainer.folder, inputs)
    before = fingerprints(trainer.trained.model)
    with engine_runs(trainer.trained.model):
        try:
            with signals.deferred():
                trainer.train(resume_from_checkpoint=str(start) if start else None)
        finally:
            release(trainer)
    trainer.trained.is_original = False
    changed = moved(trainer.trained.model, before)
    if not changed:
        raise UserError(
            f"{label}: none of the {len(before)} tensors that train moved in {trainer.state.global_step} steps; raise "
            f"{label}.learning_rate (found {trainer.args.learning_rate}) or {label}.max_steps"
        )
    counts = parameter_counts(trainer.trained.model)
    return StageResult(trainer.state.log_history, *counts, len(before), len(changed), rows.json())


class NonFiniteLossError(UserError):
    """Training produced a loss that is not a finite number."""


def stop_unless_finite(loss: Tensor, step: int, trained: Trained, folder: Path, stage: str) -> None:
    """Stop the stage at a loss that is not finite, keeping the weights that were good before this step.

    Raises:
        NonFiniteLossError: says where the weights before the step lie, or that only the stage's start is good.
    """
    if not any_rank(not math.isfinite(loss.item())):
        return
    state = trained.state_dict(keep=is_main_process())
    if from_rank_0(all(bool(t.isfinite().all()) for t in state.values())):
        if is_main_process():
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
    trainable = sum(size(p) for p in model.parameters() if p.requires_grad)
    copies = sum(size(p) for n, p in model.named_parameters() if ".critical." in n)
    return trainable, sum(size(p) for p in model.parameters()) - copies
