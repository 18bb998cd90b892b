"""Checkpoints in the middle of a stage, so that a killed run loses no more than `save_steps` steps.

transformers' own resume does not restore fused experts (huggingface/transformers#48805), pickles optimiser states, and
cannot resume a model sharded at load time. Here: safetensors and JSON, one folder `checkpoint-<step>` that appears
whole or not at all. Rank 0 writes the trained weights; the optimiser's states lie where the engine keeps them, one
file per rank where it splits them, else one (`engines/optimiser_states.py`).

This overrides private methods of transformers' Trainer (5.23: `_prepare_for_training`, `_save_checkpoint`,
`_load_from_checkpoint`, `_load_rng_state`); it can go when that issue is closed.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME

from data_prep.errors import UserError
from trainer.engines import optimiser_states
from trainer.engines.hf_trainer import EngineTrainer
from trainer.moe.json_files import Record, parse
from trainer.moe.trainable import Trained
from trainer.runtime.console import is_main_process, say
from trainer.runtime.files import atomic_write, save_tensors
from trainer.runtime.processes import any_rank, from_all_ranks, from_rank_0, rank, world_size

PREFIX = "checkpoint-"
WEIGHTS = "weights.safetensors"
ABOUT = "checkpoint.json"


class ResumableTrainer(EngineTrainer):
    """A Trainer that saves and restores what `trained` trains. Subclasses set `trained` and `folder` first."""

    trained: Trained
    folder: Path
    inputs: str = ""
    """Digest of what the stage rests on; a checkpoint of another one is not taken up."""
    _checked: bool = False

    def is_first_batch(self) -> bool:
        """True once, on the first batch of a stage that starts; never of one that goes on from a checkpoint."""
        first = not self._checked and self.state.global_step == 0
        self._checked = True
        return first

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # weights come back with the optimiser, once the engine has wrapped both

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            restore(self, Path(resume_from_checkpoint))
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _set_rng(_about(Path(checkpoint))["rng"][rank()])


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a stage's folder."""
    found = [p for p in folder.glob(PREFIX + "*") if (p / ABOUT).exists() and p.name.removeprefix(PREFIX).isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)


def clear(folder: Path) -> None:
    """Remove the checkpoints of a stage that is finished, or that starts anew."""
    if is_main_process():
        for path in folder.glob(PREFIX + "*"):
            shutil.rmtree(path)


def resumable(folder: Path, inputs: str) -> Path | None:
    """The checkpoint to go on from; one of other inputs is removed. The same answer on every rank.

    Raises:
        UserError: the checkpoint is damaged, or was made by another number of processes, which split it differently.
    """
    path = from_rank_0(latest(folder))
    if path is None:
        return None
    about = _about(path)
    if about["inputs"] != inputs:
        say(f"{path}: made by another recipe or model, removed")
        clear(folder)
        return None
    found, now = about["processes"], world_size()
    if found != now:
        raise UserError(
            f"{path}: interrupted under {found} processes, found {now}; go on with {found}, or remove {path} to train "
            "this stage from its start"
        )
    return path


def save(trainer: ResumableTrainer) -> None:
    """Write `checkpoint-<step>` and remove older ones. Collective.

    Raises:
        OSError: on every rank, where one could not write; older checkpoints stay.
    """
    folder = trainer.folder
    path = folder / f"{PREFIX}{trainer.state.global_step}"
    partial = folder / f".{path.name}.partial"
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    rngs = from_all_ranks({rank(): _rng()})
    weights, optimiser = trainer.trained.state_dict(keep=is_main_process()), optimiser_states.read(trainer)
    failed: OSError | None = None
    try:
        if is_main_process():
            save_tensors(partial / WEIGHTS, weights)
            trainer.state.save_to_json(str(partial / TRAINER_STATE_NAME))
            about = {
                "inputs": trainer.inputs,
                "processes": world_size(),
                "kept_by": optimiser_states.kept_by(trainer),
                "scheduler": trainer.lr_scheduler.state_dict() if trainer.lr_scheduler else None,
                "rng": rngs,
            }
            atomic_write(partial / ABOUT, json.dumps(about))
        if is_main_process() or optimiser_states.are_split(trainer):
            save_tensors(partial / _optimiser_file(trainer), optimiser)
    except OSError as error:
        failed = error
    if any_rank(failed is not None):
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        raise failed or OSError(f"{path}: another process could not write its part")
    if is_main_process():
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        for older in folder.glob(PREFIX + "*"):
            if older != path:
                shutil.rmtree(older)
    from_rank_0(None)


def restore(trainer: ResumableTrainer, path: Path) -> None:
    """Put back weights, optimiser and scheduler, after the engine has wrapped them. Collective.

    Raises:
        UserError: another engine kept the optimiser's states, in parts of its own; a file is damaged.
    """
    about = _about(path)
    kept_by = optimiser_states.kept_by(trainer)
    if about["kept_by"] != kept_by:
        raise UserError(
            f"{path}: optimiser states are those of {about['kept_by']}, found {kept_by}; go on with "
            f"{about['kept_by']}, or remove {path} to train this stage from its start"
        )
    trainer.trained.load_state_dict(_tensors(path / WEIGHTS))
    optimiser_states.load(trainer, _tensors(path / _optimiser_file(trainer)), path)
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.load_state_dict(about["scheduler"])
        for group, rate in zip(trainer.optimizer.param_groups, about["scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate


class _About(Record):
    inputs: str
    processes: int
    kept_by: str
    scheduler: dict[str, Any] | None
    rng: list[dict[str, Any]]


class _State(Record):
    global_step: int


def _about(path: Path) -> dict[str, Any]:
    try:
        parse(path / TRAINER_STATE_NAME, _State, "the state of a trainer")
        return parse(path / ABOUT, _About, "about a checkpoint").model_dump()
    except (ValueError, OSError) as error:
        raise UserError(f"{error}; remove {path} to train this stage from its start") from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: damaged or missing: {error}; remove {path.parent} to train this stage from its start"
        ) from error


def _optimiser_file(trainer: ResumableTrainer) -> str:
    part, parts = (rank(), world_size()) if optimiser_states.are_split(trainer) else (0, 1)
    return f"optimizer-{part}-of-{parts}.safetensors"


# --- random numbers -------------------------------------------------------------------------------


def _rng() -> dict[str, Any]:
    """State of every generator of this process, as JSON values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    python_version, python_keys, gauss = random.getstate()
    return {
        "python": [python_version, list(python_keys), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "cpu": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def _set_rng(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["cpu"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
