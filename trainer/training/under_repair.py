"""The model under repair, as the recipe's section says: experts split out, attention beside them, or all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from data_prep.errors import UserError
from trainer.moe.attention import projections
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet
from trainer.moe.experts import SplitModel
from trainer.moe.trainable import TrainableModel, WholeModel
from trainer.recipe.sections import RepairSection


def under_repair(backbone: Backbone, experts: ExpertSet, section: RepairSection) -> TrainableModel:
    """The model with its critical experts split out, or all of it for the full fine-tuning baseline.

    Raises:
        UserError: as `trained_attention`.
    """
    if section.scope == "full":
        return WholeModel(backbone)
    return SplitModel(
        backbone,
        trained_experts(experts, section),
        lora_rank=section.lora_rank,
        lora_alpha=section.lora_alpha,
        beside=trained_attention(backbone, section),
    )


def trained_experts(experts: ExpertSet, section: RepairSection) -> ExpertSet:
    """Of the critical experts those that train: all of them, or none where attention trains alone."""
    return replace(experts, members=(), shared=()) if section.scope == "attention" else experts


def trained_attention(backbone: Backbone, section: RepairSection) -> Mapping[str, nn.Linear]:
    """Name in the model -> projection of attention that trains.

    Raises:
        UserError: projections or layers that the model does not have.
    """
    wanted = section.of_attention
    if wanted is None:
        return {}
    found = projections(backbone)
    layers = list(found)
    if isinstance(wanted.layers, list):
        if unknown := [index for index in wanted.layers if index not in found]:
            raise UserError(f"repair.attention.layers: found {unknown}, allowed: layers with attention, {layers}")
        layers = wanted.layers
    elif wanted.layers is not None:
        layers = layers[: max(1, round(wanted.layers * len(layers)))]
    chosen = {name: module for index in layers for name, module in found[index].items()}
    if wanted.projections is None:
        return chosen
    known = list(dict.fromkeys(_own(name) for name in chosen))
    if missing := [name for name in wanted.projections if name not in known]:
        raise UserError(f"repair.attention.projections: found {missing}, allowed: {', '.join(known)}")
    return {name: module for name, module in chosen.items() if _own(name) in wanted.projections}


def _own(name: str) -> str:
    return name.rpartition(".")[2]
