"""What each training stage of RASA may change: for the audit and the patch, and for the planner."""

from __future__ import annotations

from trainer.methods.rasa.recipe import RasaRecipe
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet
from trainer.moe.footprint import Footprint
from trainer.training.under_repair import trained_attention, trained_experts


def may_change(recipe: RasaRecipe, backbone: Backbone, experts: ExpertSet, kind: str) -> Footprint:
    """What a training stage may change in the stock model."""
    if kind == "consistency":
        return Footprint.of_routers(backbone)
    if recipe.repair.scope == "full":
        return Footprint.everything(backbone.model)
    found = Footprint.of_experts(backbone, trained_experts(experts, recipe.repair))
    for name, module in trained_attention(backbone, recipe.repair).items():
        found |= Footprint.of(f"{name}.{own}" for own, _ in module.named_parameters())
    return found | Footprint.of_routers(backbone) if recipe.repair.train_gates else found
