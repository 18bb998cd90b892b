"""Prove from disk what an exported checkpoint is: nothing moved outside its footprint, what moved is what was trained,
every file of the base is there, and it reads back as the model that was trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_prep.errors import UserError
from trainer.model.config import read_config
from trainer.model.load import read_model, skeleton
from trainer.model.weight_files import CheckpointFiles, bits
from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint
from trainer.moe.routing import record
from trainer.release.export import CONFIG
from trainer.release.places import Places, changed_rows, held_alike
from trainer.release.rewrite import other_files
from trainer.release.trained import Trained

RELOAD_TOLERANCE = {4: 1e-3, 2: 5e-2}
"""Bytes of the narrowest type, of the model or its files -> how far the logits of the trained model and of the one
read back may be apart, as a share of their size (root mean square). Split experts add up in another order than fused
ones, and in 16 bits a token near a tie then takes another expert.
"""


class AuditFailed(UserError):
    """An export that is not what it must be; says in one line what is wrong."""


def audit_files(base: Path, folder: Path, footprint: Footprint) -> dict[str, Any]:
    """Compare an exported checkpoint with its base, tensor by tensor and expert by expert, bit by bit.

    One pair of tensors is in memory at a time. Where the base's files name their tensors otherwise than the export
    does (an older format), both models are loaded and compared instead.

    Args:
        base, folder: checkpoint folders; no process group, no GPU and no model is needed.
        footprint: what was allowed to move, by the names of the stock model.

    Returns:
        `untouched_identical`: every tensor and row outside the footprint is bit-equal to the base, in the base's type
        (None where it holds every parameter, so that there is no outside); `moved_outside` names the ones that are
        not, a tensor of another type among them. `not_moved`: experts, shared experts and routers of the footprint
        without a changed bit, and its other tensors where it is not the whole model. `files_differ`: files that are
        missing, added or altered. `experts_changed` of `experts_total`, `shared_experts_changed` (number),
        `gate_weights_changed` (share) and `tensors_changed` (number, of those in the files) are counted inside and
        outside. `footprint`: how many tensors of the files and
        how many `parameters` of the model's it holds. `compared`: "files" or "models". `not_exported`: tensors of the
        base that are left out, because its model class does not load them or they repeat a tied weight.

    Raises:
        UserError: a folder that holds no readable safetensors checkpoint.
    """
    model = skeleton(read_config(folder))
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
    left_out = [name for name in dropped if name not in moved.outside]
    return moved.summary(model, footprint, "files") | {
        "not_exported": left_out,
        "files_differ": _other_files(base, folder, same_config=True),
    }


def _other_files(base: Path, folder: Path, *, same_config: bool) -> list[str]:
    """Files without weights that are missing, that the base has not, or that differ from the base's."""
    before, after = set(other_files(base)), set(other_files(folder))
    own = set() if same_config else {CONFIG}
    differ = {name for name in before & after - own if (base / name).read_bytes() != (folder / name).read_bytes()}
    return sorted(before ^ after | differ)


def _compare_models(base: Path, folder: Path, footprint: Footprint) -> dict[str, Any]:
    """The same, parameter by parameter of two loaded models."""
    after = read_model(folder, "auto")
    before = read_model(base, after.dtype)
    old = dict(before.named_parameters()) | dict(before.named_buffers())
    new = dict(after.named_parameters()) | dict(after.named_buffers())
    where = Places(after, new, converted=True)
    moved = _Moved(where, where.footprint(footprint), outside=sorted(old.keys() ^ new.keys()))
    with CheckpointFiles(base) as files, CheckpointFiles(folder) as written:
        # A loaded model has one type: what both checkpoints hold is compared in their files, low bits and all.
        alike = held_alike(after, files.file_of, written.file_of)
        for name in sorted(old.keys() & new.keys()):
            if name in alike:
                ours, theirs = alike[name]
                moved.add(name, files.tensor(ours), written.tensor(theirs))
            else:
                moved.add(name, old[name].detach(), new[name].detach())
        types = {
            target: written.dtype(n)
            for n, place in Places(after, written.file_of).of.items()
            for target in place.targets
        }
        # Names of draft heads, of packed tensors, or older ones that become a parameter after all.
        stored = Places(after, files.file_of)
        known = after.state_dict().keys()
        moved.outside += [
            n
            for n, place in sorted(stored.of.items())
            if not _packed(n) and any(types.get(target, files.dtype(n)) != files.dtype(n) for target in place.targets)
        ]
        left_out = [n for n, place in sorted(stored.of.items()) if place.targets[0] not in known and not _packed(n)]
    return moved.summary(after, footprint, "models") | {
        "not_exported": left_out,
        "files_differ": _other_files(base, folder, same_config=False),
    }


def _packed(name: str) -> bool:
    return name.endswith(("_blocks", "_scales"))


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
    routers: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)
    """Names in the model."""

    def add(self, name: str, old: Tensor, new: Tensor) -> None:
        """Compare one pair. One of another type or shape is outside of every footprint."""
        if old.shape != new.shape or old.dtype != new.dtype:
            self.tensors += 1
            self.outside.append(name)
            if name in self.where.routers:
                self.gates += new.numel()
                self.gates_changed += new.numel()
            return
        differs = bits(old) != bits(new)
        rows = changed_rows(differs)
        if name in self.where.routers:
            self.gates += differs.numel()
            self.gates_changed += int(differs.sum())
            self.routers |= set(self.where.of[name].targets) if rows else set()
        if not rows:
            return
        self.tensors += 1
        self.moved |= set(self.where.of[name].targets)
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
            "not_moved": self._not_moved(backbone, footprint, whole_model=inside == of),
            "experts_changed": len(self.experts),
            "experts_total": self.where.total_experts,
            "shared_experts_changed": len(self.shared),
            "gate_weights_changed": self.gates_changed / self.gates,
            "tensors_changed": self.tensors,
            "footprint": {"tensors": len(self.allowed.rows), "parameters": inside, "of": of},
            "compared": compared,
        }

    def _not_moved(self, backbone: Backbone, footprint: Footprint, *, whole_model: bool) -> list[str]:
        """Experts, shared experts, routers and other tensors that were named to be changed and were not, as text."""
        found: list[str] = []
        for layer in backbone:
            named: set[int] = set()
            for name, rows in footprint.rows.items():
                if rows is not None and name.startswith(f"{layer.experts_name}."):
                    named |= rows
            found += [
                f"layer {layer.index} expert {expert}"
                for expert in sorted(named)
                if (layer.index, expert) not in self.experts
            ]
            if layer.index not in self.shared and any(name in footprint for name in layer.shared_parameters()):
                found.append(f"layer {layer.index} shared expert")
            own = {f"{layer.router_name}.{name}" for name, _ in layer.router.named_parameters()}
            if own & set(footprint) and not own & self.routers:
                found.append(f"layer {layer.index} router")
        if whole_model:
            return found
        parts = {*backbone.expert_parameters(), *backbone.router_parameters(), *backbone.shared_parameters()}
        return found + [name for name in footprint if name not in parts | self.moved]


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of every token in evaluation mode, on the CPU. Collective where the model is split over processes."""
    was_training = model.training
    model.eval()
    try:
        found: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    finally:
        model.train(was_training)
    return found.cpu()


@torch.no_grad()
def reload_check(
    folder: Path,
    logits: Tensor,
    ids: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trained: Trained | None = None,
) -> dict[str, Any]:
    """Read an exported checkpoint back; compare its logits on `ids` with those given, its weights with the trained.

    Args:
        logits: of the model that was trained, before it was fused.
        trained: what that model held; None where nothing is known of it.

    Returns:
        `reload_difference`: root mean square of the difference of the logits, as a share of theirs;
        `reload_max_logit_difference` the largest one; `reload_tokens`, and `reload_experts_reached` by them;
        `reload_ok`. `not_as_trained`: parameters, or rows of one expert, that are not what was trained; None without
        `trained`.
    """
    reloaded = read_model(folder, dtype)
    lost = None if trained is None else trained.lost(reloaded)
    reloaded.to(device)
    with record(Backbone.of(reloaded)) as trace:
        found = logits_of(reloaded, ids)
    wanted, apart = logits.float(), (found.float() - logits.cpu().float())
    difference = (apart.norm() / wanted.norm()).item()
    return {
        "not_as_trained": lost,
        "reload_difference": difference,
        "reload_max_logit_difference": apart.abs().max().item(),
        "reload_tokens": ids.numel(),
        "reload_experts_reached": sum(index_TK.unique().numel() for index_TK in trace.index_TK.values()),
        "reload_ok": difference <= RELOAD_TOLERANCE[2 if dtype.itemsize == 2 or _holds_16_bit(folder) else 4],
    }


def _holds_16_bit(folder: Path) -> bool:
    with CheckpointFiles(folder) as files:
        return any(files.dtype(name) in ("F16", "BF16") for name in files.file_of)


def refuse_failed(audit: dict[str, Any], folder: Path) -> None:
    """Refuse an export by its audit.

    Raises:
        AuditFailed: something moved outside the footprint, what is on disk is not what was trained, nothing was
            trained, files of the base are not there as they were, or the checkpoint answers differently.
    """
    named = {
        "moved_outside": "moved outside the footprint",
        "not_exported": "tensors of the base are left out",
        "not_as_trained": "the export does not hold what was trained",
        "files_differ": "not the base's file",
    }
    for key, said in named.items():
        # A base in another format is written in the present one, which has no place for what no class loads.
        if audit[key] and not (key == "not_exported" and audit["compared"] == "models"):
            more = f" and {len(audit[key]) - 5} more" if len(audit[key]) > 5 else ""
            raise AuditFailed(f"{folder}: {said}: {audit[key][:5]}{more}")
    if not audit["tensors_changed"]:
        raise AuditFailed(
            f"{folder}: nothing was trained: every weight of the export is the base's; look at learning_rate and "
            "max_steps, and whether the model's type can hold changes so small"
        )
    if not audit["reload_ok"]:
        raise AuditFailed(
            f"{folder}: the checkpoint answers otherwise than the trained model: its logits differ by "
            f"{audit['reload_difference']:.2%} of their size"
        )
