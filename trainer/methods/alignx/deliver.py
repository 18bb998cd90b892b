"""What leaves an AlignX run: a folder per adapter as PEFT reads it, the head, and the proof that nothing else moved.

`adapters/<axis>/` loads with `PeftModel.from_pretrained`; `head.safetensors` was written by its own step. A static
merge is a stock checkpoint: the base plus the sum of the adapters' task vectors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from data_prep.errors import UserError
from trainer.methods.alignx.adapters import Adapter, AxisAdapters, lora_config
from trainer.methods.alignx.recipe import AdaptersSection, AlignxRecipe
from trainer.model.load import load
from trainer.model.weight_files import local_folder
from trainer.pipeline.experiment import Experiment, Kept, Step
from trainer.pipeline.publish import probe
from trainer.release.audit import logits_of
from trainer.release.export import export_checkpoint
from trainer.runtime.console import is_main_process, say
from trainer.runtime.files import atomic_write, save_tensors
from trainer.runtime.processes import from_rank_0

FOLDER = "adapters"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""
SAME = 1e-4
"""Largest difference of logits between an adapter in training and in its folder, both in fp32 on one device."""


def deliver(
    experiment: Experiment[AlignxRecipe], adapters: AxisAdapters, base_digest: str, after: Sequence[Step[Any]]
) -> dict[str, Any]:
    """The step `export`: every axis' adapter in PEFT's format, read back, and `audit.json`.

    Of a float32 model the logits are compared, too, with those of a fresh base in plain PEFT; a 16-bit one may be too
    large for a second copy, and its logits differ by rounding anyway.

    Args:
        base_digest: of the base as it was loaded.

    Raises:
        UserError: a weight of the base moved, or an adapter's folder is not what was trained.
    """
    recipe, path = experiment.recipe, experiment.folder / "audit.json"
    folder = experiment.folder / FOLDER

    def make() -> dict[str, Any]:
        states = {name: Adapter(adapters, name).state_dict() for name in recipe.names}
        now, compared = adapters.base_digest(), sum(1 for _ in adapters.base_parameters())
        audit: dict[str, Any] = {}
        if is_main_process():
            for name, state in states.items():
                write_adapter(folder / name, state, recipe.adapters, recipe.model.name_or_path)
            same = all(_reads_back(folder / name, state) for name, state in states.items())
            difference = None
            if adapters.model.dtype == torch.float32:
                ids = probe(experiment)
                difference = max(_difference(experiment, adapters, folder, name, ids) for name in recipe.names)
            audit = {
                "untouched_identical": now == base_digest,
                "compared": compared,
                "reload_max_logit_difference": difference,
                "reload_ok": same and (difference is None or difference <= SAME),
            }
            atomic_write(path, json.dumps(audit, indent=1))
        audit = from_rank_0(audit)
        if not audit["untouched_identical"]:
            raise UserError(f"{path}: a weight of the base moved; only adapters may")
        if not audit["reload_ok"]:
            raise UserError(f"{path}: an adapter read back from {folder} is not the one that was trained")
        return audit

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def written(_: dict[str, Any]) -> None:
        """By `make`, before it refuses: a failed audit is there to be read."""

    kept = Kept(written, lambda: [path, folder], read)
    return experiment.step("export", make, kept, reads=["axes", "adapters"], after=after).value


def write_adapter(folder: Path, state: dict[str, Tensor], section: AdaptersSection, base: str) -> None:
    """One adapter as PEFT keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = lora_config(section)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    save_tensors(folder / WEIGHTS, {f"{PREFIX}{name}": value for name, value in state.items()})


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The weights that `write_adapter` wrote, by their names in the model.

    Raises:
        UserError: there is no adapter.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: missing; the run exported no adapter there: run it to its end")
    return {name.removeprefix(PREFIX): value for name, value in load_file(path).items()}


def _reads_back(folder: Path, state: dict[str, Tensor]) -> bool:
    found = read_adapter(folder)
    return found.keys() == state.keys() and all(found[name].equal(value) for name, value in state.items())


def static_merge(experiment: Experiment[AlignxRecipe], adapters: AxisAdapters, folder: Path) -> None:
    """Write the base plus the sum of every axis' task vector as a stock checkpoint."""
    recipe = experiment.recipe
    deltas = {
        where: torch.stack([adapters.delta(layer, name) for name in recipe.names]).sum(0).cpu()
        for where, layer in adapters.layers.items()
    }
    if not is_main_process():
        return
    model = load(recipe.model, torch.device("cpu"))[0]
    merge_into(model, deltas)
    base = local_folder(recipe.model.name_or_path, recipe.model.revision, others=True)
    export_checkpoint(model, base, folder, recipe.export)
    say(f"checkpoint: {folder}")


@torch.no_grad()
def merge_into(model: PreTrainedModel, deltas: dict[str, Tensor]) -> None:
    """Add task vectors [out, in], fp32, to the linear layers of a stock model, by name."""
    for where, delta in deltas.items():
        weight = model.get_parameter(f"{where}.weight")
        weight.copy_((weight.float() + delta).to(weight.dtype))


def _difference(
    experiment: Experiment[AlignxRecipe], adapters: AxisAdapters, folder: Path, name: str, ids: Tensor
) -> float:
    """Largest difference of logits: the adapter in memory, and a fresh base with its folder in plain PEFT."""
    with adapters.acting(name):
        ours = logits_of(adapters.model, ids.to(adapters.model.device)).cpu()
    stock = load(experiment.recipe.model, adapters.model.device)[0]
    read: Any = PeftModel.from_pretrained(stock, str(folder / name), adapter_name=name)
    return float((logits_of(read, ids.to(adapters.model.device)).cpu() - ours).abs().max())
