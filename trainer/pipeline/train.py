"""Training stages in a run folder: the model made ready, each stage done once, its weights kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from data_prep.errors import UserError
from trainer.engines.engine import engine
from trainer.engines.table import names as engine_names
from trainer.moe.expert_set import ExpertSet
from trainer.moe.trainable import TrainableModel, Trained, WholeModel
from trainer.pipeline.experiment import Experiment
from trainer.recipe.section import TrainerSection
from trainer.recipe.sections import RepairSection
from trainer.run.step import Kept, Step
from trainer.runtime.console import is_main_process
from trainer.runtime.files import atomic_write, save_tensors
from trainer.training import resume
from trainer.training.loop import StageResult
from trainer.training.under_repair import trained_attention, under_repair

BITSANDBYTES = ("8bit", "bnb", "paged")
"""What the names of its optimisers hold."""
Train = Callable[[Path, str], StageResult]
"""(folder of the stage, what a checkpoint in its middle must agree with) -> what training did."""


def refuse_what_the_engine_cannot(sections: dict[str, TrainerSection]) -> None:
    """Check the training sections, by name, before anything is loaded.

    Raises:
        UserError: an optimiser that cannot step parameters as this engine holds them.
    """
    for name, section in sections.items():
        optim = str(section.given_arguments.get("optim", ""))
        if any(part in optim for part in BITSANDBYTES) and not engine().capabilities.steps_with_bitsandbytes:
            others = ", ".join(engine_names(lambda e: e.steps_with_bitsandbytes))
            raise UserError(
                f"{name}.optim: found {optim!r}, which cannot step parameters that {engine().name} splits; allowed: "
                f"adamw_torch, or another engine ({others})"
            )


def whole(experiment: Experiment[Any]) -> Experiment[Any]:
    """The experiment with its model whole in memory, as splitting out experts needs it: itself, or a fresh copy."""
    if not experiment.holds_parts:
        return experiment
    fresh = experiment.reloaded()
    if experiment.recipe.model.quantization is not None:
        experiment.model.to("meta")  # the caller still holds it: packed weights would stay beside the new ones
    return fresh


def split(experiment: Experiment[Any], experts: ExpertSet, section: RepairSection) -> TrainableModel:
    """The model as `under_repair` makes it. Whole on entry, and held as the engine does afterwards. Collective.

    Raises:
        UserError: the recipe names attention that the model does not have.
    """
    attention = trained_attention(experiment.backbone, section).values()
    experiment.engine.make_real(parameter for module in attention for parameter in module.parameters())
    set_seed(experiment.recipe.run.seed)  # LoRA starts from drawn weights: the same ones in a resumed run
    model = under_repair(experiment.backbone, experts, section)
    if isinstance(model, WholeModel):
        experiment.engine.shard(model.reference)
    experiment.hold(model.backbone)
    if experiment.recipe.model.quantization is not None:
        model.is_original = False  # its original is packed whole, the critical experts that train are not
    return model


def train_step(
    experiment: Experiment[Any],
    name: str,
    number: int,
    model: Trained,
    train: Train,
    *,
    reads: Sequence[str],
    after: Sequence[Step[Any]],
) -> Step[dict[str, Any]]:
    """Train a stage and keep its weights, or take them up where the stage was done before; its value is its effect.

    Args:
        number: of the stage in the schedule, from 1; it draws its own random numbers.
    """
    folder = experiment.stage_dir(number, name)
    names = ("state.safetensors", "log.json", "parameters.json", "rows.json", "effect.json")
    state, log, sizes, rows, effect = files = [folder / name for name in names]
    identity = experiment.identity(name, reads, after)
    holds_result = False

    def make() -> tuple[dict[str, Tensor], StageResult]:
        nonlocal holds_result
        set_seed(experiment.recipe.run.seed + number)
        result = train(folder, identity)
        holds_result = True
        return model.state_dict(keep=is_main_process()), result

    def write(made: tuple[dict[str, Tensor], StageResult]) -> None:
        weights, result = made
        save_tensors(state, weights)
        atomic_write(log, json.dumps(result.log, indent=1))
        keys = ("trained_parameters", "total_parameters", "trained_tensors", "moved_tensors")
        atomic_write(sizes, json.dumps({key: getattr(result, key) for key in keys}))
        atomic_write(rows, json.dumps(result.rows, indent=1))
        atomic_write(effect, json.dumps(result.effect, indent=1))

    def read() -> dict[str, Any]:
        if not holds_result:  # what was just written is what the model holds
            model.load_state_dict(load_file(state))
        found: dict[str, Any] = json.loads(effect.read_text())
        return found

    step = experiment.step(name, make, Kept(write, lambda: files, read), reads=reads, after=after)
    resume.clear(folder)
    return step
