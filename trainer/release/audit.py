"""Prove from disk that an exported checkpoint moved nothing outside its footprint, and that it reads back the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from trainer.model.load import read_model, skeleton
from trainer.model.weight_files import CheckpointFiles, bits
from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint
from trainer.release.places import Places, changed_rows

RELOAD_TOLERANCE = 1e-3
"""Largest difference of logits between the model in memory and the one read back from disk."""


def audit_files(base: Path, folder: Path, footprint: Footprint) -> dict[str, Any]:
    """Compare an exported checkpoint with its base, tensor by tensor and expert by expert, bit by bit.

    One pair of tensors is in memory at a time. Where the base's files name their tensors otherwise than the export
    does (an older format), both models are loaded and compared instead.

    Args:
        base, folder: checkpoint folders; no process group, no GPU and no model is needed.
        footprint: what was allowed to move, by the names of the stock model.

    Returns:
        `untouched_identical`: every tensor and row outside the footprint is bit-equal to the base (None where it holds
        every parameter, so that there is no outside); `moved_outside` names the ones that are not. `experts_changed`
        of `experts_total`, `shared_experts_changed` (number), `gate_weights_changed` (share) and `tensors_changed`
        (number, of those in the files) are counted inside and outside. `footprint`: how many tensors of the files and
        how many `parameters` of the model's it holds. `compared`: "files" or "models". `base_cast_to`: the type the
        base was cast to first, where it is stored in another one than the export. `not_exported`: tensors of the base
        that its model class does not load or that repeat a tied weight.

    Raises:
        UserError: a folder that holds no readable safetensors checkpoint.
    """
    model = skeleton(AutoConfig.from_pretrained(folder))
    with CheckpointFiles(base) as before, CheckpointFiles(folder) as after:
        if after.file_of.keys() - before.file_of.keys():
            return _compare_models(base, folder, footprint)
        where = Places(model, after.file_of)
        moved = _Moved(where, where.footprint(footprint))
        for name in sorted(after.file_of):
            moved.add(name, before.tensor(name), after.tensor(name))
        dropped = sorted(before.file_of.keys() - after.file_of.keys())
        if dropped:
            moved.outside += _missing(model, Places(model, before.file_of), where, dropped)
    return moved.summary(model, footprint, "files") | {"not_exported": [n for n in dropped if n not in moved.outside]}


def _compare_models(base: Path, folder: Path, footprint: Footprint) -> dict[str, Any]:
    """The same, parameter by parameter of two loaded models."""
    after = read_model(folder, "auto")
    before = read_model(base, after.dtype)
    old = dict(before.named_parameters()) | dict(before.named_buffers())
    new = dict(after.named_parameters()) | dict(after.named_buffers())
    where = Places(after, new, converted=True)
    moved = _Moved(where, where.footprint(footprint), outside=sorted(old.keys() ^ new.keys()))
    for name in sorted(old.keys() & new.keys()):
        moved.add(name, old[name].detach(), new[name].detach())
    return moved.summary(after, footprint, "models") | {"not_exported": []}


def _missing(model: PreTrainedModel, base: Places, exported: Places, dropped: list[str]) -> list[str]:
    """Of the tensors that the export left out, those that the model would have loaded."""
    known, written = model.state_dict().keys(), exported.targets | exported.tied.keys()
    return [name for name in dropped if base.of[name].targets[0] in known - written]


@dataclass
class _Moved:
    """What differs, added up. `allowed`: the footprint in the names of the files."""

    where: Places
    allowed: Footprint
    outside: list[str] = field(default_factory=list)
    tensors: int = 0
    experts: set[tuple[int, int]] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)
    gates: int = 0
    gates_changed: int = 0
    cast_to: set[str] = field(default_factory=set)

    def add(self, name: str, old: Tensor, new: Tensor) -> None:
        """Compare one pair. Only a floating-point tensor may have another type in the base."""
        if old.dtype != new.dtype and old.is_floating_point() and new.is_floating_point():
            self.cast_to.add(str(new.dtype).removeprefix("torch."))
            old = old.to(new.dtype)
        if old.shape != new.shape or old.dtype != new.dtype:
            self.tensors += 1
            self.outside.append(name)
            return
        differs = bits(old) != bits(new)
        rows = changed_rows(differs)
        if name in self.where.routers:
            self.gates += differs.numel()
            self.gates_changed += int(differs.sum())
        if not rows:
            return
        self.tensors += 1
        if name in self.where.experts:
            one = self.where.of[name].row
            self.experts |= {(self.where.experts[name], row) for row in (rows if one is None else [one])}
        if name in self.where.shared:
            self.shared.add(self.where.shared[name])
        if not self.allowed.covers(name, rows):
            self.outside.append(name)

    def summary(self, model: PreTrainedModel, footprint: Footprint, compared: str) -> dict[str, Any]:
        backbone = Backbone.of(model)
        inside, of = footprint.parameters(backbone), Footprint.everything(model).parameters(backbone)
        return {
            "untouched_identical": not self.outside if inside < of else None,
            "moved_outside": sorted(self.outside),
            "experts_changed": len(self.experts),
            "experts_total": self.where.total_experts,
            "shared_experts_changed": len(self.shared),
            "gate_weights_changed": self.gates_changed / self.gates,
            "tensors_changed": self.tensors,
            "footprint": {"tensors": len(self.allowed.rows), "parameters": inside, "of": of},
            "compared": compared,
            "base_cast_to": ", ".join(sorted(self.cast_to)) or None,
        }


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
