"""What each training stage of RASA may change: for the audit and the patch, and for the planner."""

from __future__ import annotations

from trainer.methods.rasa.recipe import RasaRecipe
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet
from trainer.moe.footprint import Footprint


def may_change(recipe: RasaRecipe, backbone: Backbone, experts: ExpertSet, kind: str) -> Footprint:
    """What a training stage may change in the stock model."""
    if kind == "consistency":
        return Footprint.of_routers(backbone)
    if recipe.repair.scope == "full":
        return Footprint.everything(backbone.model)
    of_experts = Footprint.of_experts(backbone, experts)
    return of_experts | Footprint.of_routers(backbone) if recipe.repair.train_gates else of_experts
