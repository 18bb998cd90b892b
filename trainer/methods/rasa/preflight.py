"""What a repair would train on a model, before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from data_prep.errors import UserError
from trainer.methods.rasa.recipe import RasaRecipe


def would_train(found: dict[str, Any], recipe: RasaRecipe) -> dict[str, int]:
    """How many experts and parameters a recipe would train on a described model; shared experts of all layers.

    Raises:
        UserError: the recipe asks for shared experts, which the model does not have.
    """
    top_k, total = recipe.detect.top_k, found["routed_experts"]
    experts = total if recipe.repair.scope == "full" else round(top_k * total) if isinstance(top_k, float) else top_k
    trained = found["parameters"] if recipe.repair.scope == "full" else experts * found["parameters_per_expert"]
    layers = [layer["layer"] for layer in found["layers"] if layer["shared_expert"]]
    check_shared_experts(recipe, found["model_type"], layers)
    if recipe.detect.shared_experts and recipe.repair.scope == "experts":
        trained += found["shared_expert_parameters"]
    return {"experts": experts, "of_experts": total, "parameters": trained, "of_parameters": found["parameters"]}


def check_shared_experts(recipe: RasaRecipe, model_type: str, layers: Collection[int]) -> None:
    """Refuse an edit of shared experts on a model that has none; `layers` are those that have one.

    Raises:
        UserError: names the key and the model's type.
    """
    if recipe.detect.shared_experts and not layers:
        raise UserError(f"detect.shared_experts: found true, but {model_type} has no shared experts; allowed: false")
