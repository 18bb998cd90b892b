"""Write the repaired model as a stock checkpoint, and prove from disk that nothing else moved."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from data_prep.errors import UserError
from trainer.model.load import read_model, skeleton
from trainer.model.weight_files import INDEX, SINGLE, CheckpointFiles, bits
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet
from trainer.runtime.files import tensor_errors_as_oserror, write_tensors

RELOAD_TOLERANCE = 1e-3
"""Largest difference of logits between the model in memory and the one read back from disk."""


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a fused model and its tokenizer, whole or not at all.

    The folder loads with `from_pretrained` without this project: transformers turns fused experts back into the Hub's
    format, bit for bit. Besides the model, one shard and one layer are held in memory; its own `save_pretrained` holds
    a second copy of most experts.

    Args:
        state_dict: the weights where the model itself holds only a part of them (gathered from a sharded engine).

    Raises:
        OSError: disk full or not writable; a checkpoint written before stays as it was.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tensor_errors_as_oserror(folder):
            model.save_pretrained(partial, state_dict={})  # the configuration; of weights an empty file
            _write_weights(model, model.state_dict() if state_dict is None else state_dict, partial, max_shard_size)
        tokenizer.save_pretrained(partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _write_weights(model: PreTrainedModel, state: dict[str, Tensor], folder: Path, max_shard_size: str) -> None:
    """The tensors that `save_pretrained` would write, made layer by layer."""
    (folder / SINGLE).unlink(missing_ok=True)
    state = {name: tensor for name, tensor in state.items() if name not in (model._keys_to_ignore_on_save or ())}
    state = remove_tied_weights_from_state_dict(state, model)
    names = sorted(state, key=dot_natural_key)
    shapes = {name: torch.empty_like(state[name], device="meta") for name in names}
    converted = revert_weight_conversion(model, shapes)
    # Each with storage of its own: the sizes of views would be those of what they are views of.
    planned = {name: torch.empty_like(tensor) for name, tensor in converted.items()}
    plan = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    layers = [list(group) for _, group in groupby(names, key=_layer_of)]
    apart = [name for layer in layers for name in revert_weight_conversion(model, {n: shapes[n] for n in layer})]
    if sorted(apart) != sorted(planned):
        layers = [names]  # rules that look at several layers at once
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in plan.filename_to_tensors}
    for layer in layers:
        for name, tensor in revert_weight_conversion(model, {n: state[n] for n in layer}).items():
            file = plan.tensor_to_filename[name]
            waiting[file][name] = tensor.contiguous()
            if len(waiting[file]) == len(plan.filename_to_tensors[file]):
                write_tensors(folder / file, waiting.pop(file), {"format": "pt"})
    assert not waiting, "every planned tensor is made by some layer"
    if plan.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _layer_of(name: str) -> str:
    """Everything up to the first number in a parameter's name, or the whole name."""
    found = re.match(r".*?\.\d+\.", name)
    return found.group() if found else name


# --- what moved -----------------------------------------------------------------------------------


def audit_files(base: Path, folder: Path, expert_set: ExpertSet | None) -> dict[str, Any]:
    """Compare an exported checkpoint with its base, tensor by tensor and expert by expert, bit by bit.

    One pair of tensors is in memory at a time. Where the base's files name their tensors otherwise than the export
    does (an older format), both models are loaded and compared instead.

    Args:
        base, folder: checkpoint folders; no process group, no GPU and no model is needed.
        expert_set: the experts that were allowed to move; None for full fine-tuning.

    Returns:
        `untouched_identical`: every tensor outside the set and the routers is bit-equal to the base (None for full
        fine-tuning); `moved_outside` names the ones that are not. `experts_changed` of `experts_total`,
        `shared_experts_changed` (number), `gate_weights_changed` (share). `compared`: "files" or "models".
        `base_cast_to`: the type the base was cast to first, where it is stored in another one than the export.
        `not_exported`: tensors of the base that its model class does not load or that repeat a tied weight.

    Raises:
        UserError: a folder that holds no readable safetensors checkpoint.
    """
    model = skeleton(AutoConfig.from_pretrained(folder))
    with CheckpointFiles(base) as before, CheckpointFiles(folder) as after:
        if after.file_of.keys() - before.file_of.keys():
            return _compare_models(base, folder, expert_set)
        moved = _Moved(expert_set)
        where = _Places(model, after.file_of)
        for name in sorted(after.file_of):
            moved.add(name, where, before.tensor(name), after.tensor(name))
        dropped = sorted(before.file_of.keys() - after.file_of.keys())
        if dropped:
            loaded = _Places(model, before.file_of).targets
            exported = set(where.targets.values()) | _tied(model)
            known = model.state_dict().keys()
            moved.outside += [n for n in dropped if loaded[n] in known and loaded[n] not in exported]
    return moved.summary(where.total, "files") | {"not_exported": [n for n in dropped if n not in moved.outside]}


def _compare_models(base: Path, folder: Path, expert_set: ExpertSet | None) -> dict[str, Any]:
    """The same, parameter by parameter of two loaded models."""
    after = read_model(folder, "auto")
    before = read_model(base, after.dtype)
    old = dict(before.named_parameters()) | dict(before.named_buffers())
    new = dict(after.named_parameters()) | dict(after.named_buffers())
    moved = _Moved(expert_set, outside=sorted(old.keys() ^ new.keys()))
    where = _Places(after, new, converted=True)
    for name in sorted(old.keys() & new.keys()):
        moved.add(name, where, old[name].detach(), new[name].detach())
    return moved.summary(where.total, "models") | {"not_exported": []}


@dataclass
class _Moved:
    """What differs, added up."""

    expert_set: ExpertSet | None
    outside: list[str] = field(default_factory=list)
    experts: set[tuple[int, int]] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)
    gates: int = 0
    gates_changed: int = 0
    cast_to: set[str] = field(default_factory=set)

    def add(self, name: str, where: _Places, old: Tensor, new: Tensor) -> None:
        """Compare one pair. Only a floating-point tensor may have another type in the base."""
        if old.dtype != new.dtype and old.is_floating_point() and new.is_floating_point():
            self.cast_to.add(str(new.dtype).removeprefix("torch."))
            old = old.to(new.dtype)
        if old.shape != new.shape or old.dtype != new.dtype:
            self.outside.append(name)
            return
        differs = bits(old) != bits(new)
        if name in where.routers:
            self.gates += differs.numel()
            self.gates_changed += int(differs.sum())
        elif name in where.experts:
            layer, expert = where.experts[name]
            per_expert = differs.flatten(1).any(1) if expert is None else differs.any().unsqueeze(0)
            changed = [(layer, e if expert is None else expert) for e in per_expert.nonzero()[:, 0].tolist()]
            self.experts |= set(changed)
            if self.expert_set is not None and not set(changed) <= self.expert_set.pairs:
                self.outside.append(name)
        elif differs.any():
            layer_of_shared = where.shared.get(name)
            if layer_of_shared is not None:
                self.shared.add(layer_of_shared)
            if self.expert_set is not None and layer_of_shared not in self.expert_set.shared:
                self.outside.append(name)

    def summary(self, total: int, compared: str) -> dict[str, Any]:
        return {
            "untouched_identical": not self.outside if self.expert_set is not None else None,
            "moved_outside": sorted(self.outside),
            "experts_changed": len(self.experts),
            "experts_total": total,
            "shared_experts_changed": len(self.shared),
            "gate_weights_changed": self.gates_changed / self.gates,
            "compared": compared,
            "base_cast_to": ", ".join(sorted(self.cast_to)) or None,
        }


# --- which tensor of a file is what ---------------------------------------------------------------


class _Places:
    """Where the tensors of a checkpoint go in its model, by transformers' own rules for loading it.

    `experts`: tensor name -> (layer, expert), the expert None where all of a layer are stacked in dimension 0.
    `routers`: names of the routers' parameters. `shared`: tensor name -> layer of a shared expert. `targets`: tensor
    name -> parameter or buffer of the model.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str], converted: bool = False) -> None:
        backbone = Backbone.of(model)
        self.total = backbone.total_experts
        fused = backbone.expert_parameters()
        layers = {name: layer for layer in backbone for name in fused if name.startswith(layer.experts_name + ".")}
        found = {name: (name, None) for name in names} if converted else _targets(model, names)
        self.targets = {name: target for name, (target, _) in found.items()}
        self.routers = {name for name, target in self.targets.items() if target in backbone.router_parameters()}
        layer_of = {name: layer.index for layer in backbone for name in layer.shared_parameters()}
        self.shared = {name: layer_of[target] for name, target in self.targets.items() if target in layer_of}
        self.experts: dict[str, tuple[int, int | None]] = {}
        count, position = Counter(found.values()), Counter[tuple[str, str | None]]()
        # Experts are stacked in the natural order of their names.
        for name in sorted(found, key=dot_natural_key):
            target = self.targets[name]
            if target not in fused:
                continue
            layer, of = layers[target], count[found[name]]
            if of not in (1, layer.num_experts):
                raise UserError(f"{target}: {of} tensors of experts in the files, the model has {layer.num_experts}")
            stacked = of == 1 and layer.num_experts > 1
            self.experts[name] = (layer.index, None if stacked else position[found[name]])
            position[found[name]] += 1


def _targets(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Tensor name -> (parameter it is loaded into, the pattern that makes it one part of several)."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known = model.state_dict()
    found = {}
    for name in sorted(names, key=dot_natural_key):
        target = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target[0] not in known and name in known:
            target = (name, None)
        found[name] = target
    return found


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that share another one's memory."""
    return set(getattr(model, "all_tied_weights_keys", {}))


# --- whether it reads back ------------------------------------------------------------------------


@torch.no_grad()
def reload_check(
    folder: Path, logits: Tensor, ids: Tensor, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Read an exported checkpoint back and compare its logits on `ids` with those of the model in memory.

    Returns:
        `reload_max_logit_difference` and `reload_ok`.
    """
    reloaded = read_model(folder, dtype).to(device)
    found = reloaded(input_ids=ids.to(device), use_cache=False).logits
    difference = (found.float() - logits.to(device).float()).abs().max().item()
    return {"reload_max_logit_difference": difference, "reload_ok": difference <= RELOAD_TOLERANCE}
