"""What an answer of the mixture costs, in every mode, beside the base, a merge and a mixture of three whole MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.evaluation.generation import left_pad
from trainer.methods.alignx.axes import Axis
from trainer.methods.alignx.compare import MODES
from trainer.methods.alignx.cost import BASE, Prompts, measure_cost, mlp_mixture
from trainer.methods.alignx.deliver import merge_into
from trainer.methods.alignx.features import Views
from trainer.methods.alignx.head.head import MoCaE
from trainer.methods.alignx.mixture import Mixture
from trainer.methods.alignx.stages import Stages
from trainer.model.load import load
from trainer.pipeline.experiment import JsonFile, Step

PROMPTS, NEW_TOKENS, ROUNDS = 16, 32, 3
"""How many prompts at a time, tokens of each reply, and turns of each way."""


def costs(stages: Stages, views: Views, routed: Step[MoCaE]) -> dict[str, Any]:
    """The step `cost`: `measure_cost` of every way to answer the same prompts. Rank 0 measures."""
    experiment, recipe = stages.experiment, stages.experiment.recipe

    def make() -> dict[str, Any]:
        device = experiment.model.device
        stock = load(recipe.model, device)[0]
        ways: dict[str, Callable[[], nn.Module]] = {BASE: lambda: stock, "mlp_mixture": lambda: mlp_mixture(stock)}
        for mode in MODES:
            mixture = Mixture(views, routed.value, mode)
            ways[f"mixture_{mode}"] = lambda mixture=mixture: mixture  # type: ignore[misc]
        merged = load(recipe.model, device)[0]
        deltas = {
            where: torch.stack([views.adapters.delta(layer, name) for name in recipe.names]).sum(0)
            for where, layer in views.adapters.layers.items()
        }
        merge_into(merged, deltas)
        ways["static"] = lambda: merged
        return measure_cost(ways, _prompts(stages.axes, stages, device), ROUNDS)

    kept = JsonFile(experiment.folder / "cost.json")
    found: dict[str, Any] = experiment.step("cost", make, kept, reads=["features", "inference"], after=[routed]).value
    return found


def _prompts(axes: list[Axis], stages: Stages, device: torch.device) -> Prompts:
    """Test prompts of all axes in turn."""
    chat = stages.experiment.chat
    rows = [prompt for group in zip(*(axis.rows.test for axis in axes), strict=False) for prompt in group][:PROMPTS]
    ids_BS, mask_BS = left_pad([chat.opening(prompt.conversation) for prompt in rows], chat.padding, device)
    return Prompts(ids_BS, mask_BS, NEW_TOKENS)
