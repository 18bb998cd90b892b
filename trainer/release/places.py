"""Which tensor of a checkpoint's files is what in its model, by transformers' own rules for loading it.

The files name tensors otherwise than the model does (one tensor per expert, where the model stacks them), so what may
change in the model is put into the files' names here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from data_prep.errors import UserError
from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint


@dataclass(frozen=True)
class Place:
    """Where one tensor of a file goes.

    `targets`: parameters or buffers of the model, more than one where the file packs several in one tensor. `row`: the
    tensor is this row of its target, an expert of a stacked parameter. `by_rows`: its rows are its target's rows.
    """

    targets: tuple[str, ...]
    row: int | None = None
    by_rows: bool = False


class Places:
    """The places of all tensors of a checkpoint.

    `of`: tensor name -> place. `routers`: names of the routers' parameters. `experts`, `shared`: tensor name -> layer
    of the routed experts, of the shared expert, that it holds. `tied`: names of the parameters that share another
    one's memory.

    Args:
        names: the names in the files.
        converted: they are those of the model itself.

    Raises:
        UserError: the files hold another number of experts than the model.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str], converted: bool = False) -> None:
        backbone = Backbone.of(model)
        self.total_experts = backbone.total_experts
        self.of: dict[str, Place] = {}
        self.experts: dict[str, int] = {}
        fused = backbone.expert_parameters()
        layers = {name: layer for layer in backbone for name in fused if name.startswith(layer.experts_name + ".")}
        found = {name: ((name,), None) for name in names} if converted else targets_of(model, names)
        count, position = Counter(found.values()), Counter[tuple[tuple[str, ...], str | None]]()
        # Experts are stacked in the natural order of their names.
        for name in sorted(found, key=dot_natural_key):
            targets, pattern = found[name]
            if targets[0] not in fused:
                self.of[name] = Place(targets, by_rows=pattern is None)
                continue
            layer, tensors = layers[targets[0]], count[found[name]]
            if tensors not in (1, layer.num_experts):
                raise UserError(
                    f"{targets[0]}: {tensors} tensors of experts in the files, the model has {layer.num_experts}"
                )
            stacked = tensors == 1 and layer.num_experts > 1
            row = None if stacked else position[found[name]]
            self.of[name] = Place(targets, row, by_rows=stacked and len(targets) == 1)
            self.experts[name] = layer.index
            position[found[name]] += 1
        self.targets = {target for place in self.of.values() for target in place.targets}
        routers = backbone.router_parameters()
        self.routers = {name for name, place in self.of.items() if place.targets[0] in routers}
        layer_of = {name: layer.index for layer in backbone for name in layer.shared_parameters()}
        shared = {name: layer_of.get(place.targets[0]) for name, place in self.of.items()}
        self.shared = {name: layer for name, layer in shared.items() if layer is not None}
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))

    def footprint(self, footprint: Footprint) -> Footprint:
        """What may change in the model as what may change in the files: their tensors, whole or some rows of them."""
        rows: dict[str, frozenset[int] | None] = {}
        inside = self._with_names_in_files(footprint)
        for name, place in self.of.items():
            given = [inside.rows.get(target, frozenset()) for target in place.targets]
            if all(rows_of is None or place.row in rows_of for rows_of in given):
                rows[name] = None
            elif place.by_rows and given[0]:
                rows[name] = given[0]
        return Footprint(rows)

    def _with_names_in_files(self, footprint: Footprint) -> Footprint:
        """Of tied parameters the files hold one: what may change by another of its names may change by that one."""
        found = footprint
        for name in footprint.rows.keys() - self.targets:
            one = self.tied.get(name, name)
            for written in self.targets & {one, *(other for other, of in self.tied.items() if of == one)}:
                found |= Footprint({written: footprint.rows[name]})
        return found


def held_alike(model: PreTrainedModel, base: Iterable[str], written: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name in the model -> its names in two checkpoints, of the tensors that both hold as the model does."""
    ours, theirs = (
        {targets[0]: name for name, (targets, pattern) in targets_of(model, names).items() if pattern is None}
        for names in (base, written)
    )
    return {target: (ours[target], theirs[target]) for target in ours.keys() & theirs.keys()}


def changed_rows(differs: Tensor) -> list[int]:
    """Indices of the rows (of a vector, the elements) with a true value; a scalar is its only row."""
    per_row = differs.flatten(1).any(1) if differs.ndim > 1 else differs.reshape(-1)
    return per_row.nonzero()[:, 0].tolist()


def targets_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[tuple[str, ...], str | None]]:
    """Tensor name -> (parameters it is loaded into, the pattern of the rule that does more than rename it)."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    made_by = {pattern: converter.target_patterns for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    found: dict[str, tuple[tuple[str, ...], str | None]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            found[name] = ((name,), None)
            continue
        # Of a tensor that becomes several, the library names the first.
        first, *others = made_by[pattern] if pattern is not None else [target]
        others = [target.replace(first, other, 1) if first in target else other for other in others]
        found[name] = ((target, *others), pattern)
    return found
