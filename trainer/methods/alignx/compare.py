"""What the mixture is compared with, on the same held-out prompts: joint SFT, merges, other modes, heads of fewer
pieces.

joint      one adapter for all axes, trained on the same rows in as many steps
static     the sum of the adapters' task vectors on every prompt: a merge at scale 1
uniform    every adapter at 1 / A on every prompt: their average, a mixture without a router
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.methods.alignx.evaluate import measure_axes
from trainer.methods.alignx.features import Views
from trainer.methods.alignx.head.fit import fit
from trainer.methods.alignx.head.head import MoCaE
from trainer.methods.alignx.mixture import Mixture, Mode, Uniform
from trainer.methods.alignx.route import Cached
from trainer.methods.alignx.stages import JOINT, Stages
from trainer.pipeline.experiment import Step

MODES: tuple[Mode, ...] = ("weights", "top1", "hidden")
HEADS: Mapping[str, dict[str, str]] = {
    "gate_only": {"fractal": "off", "natural": "off"},
    "gate_fractal": {"fractal": "on", "natural": "off"},
    "gate_natural": {"fractal": "off", "natural": "on"},
    "gate_fractal_natural": {"fractal": "on", "natural": "on"},
}
"""Name -> what a head of these pieces has switched; the rest is as the recipe says, without output calibration."""


@dataclass(frozen=True)
class Compared:
    """`baselines`: name -> R of every axis. `head`: what the bank's held-out rows say of the head's pieces."""

    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)


def compare(stages: Stages, views: Views, cached: Step[Cached], routed: Step[MoCaE]) -> Compared:
    """Train and measure every baseline; each in a step of its own."""
    experiment, recipe = stages.experiment, stages.experiment.recipe
    stages.train_joint()
    found = {JOINT: stages.rates[JOINT]}
    trained = stages.ended(recipe.names)

    def measured(name: str, model: Mixture, after: list[Step[Any]], *reads: str) -> dict[str, Any]:
        rates: dict[str, Any] = measure_axes(experiment, stages.axes, name, after, model=model, reads=reads).value[
            "rates"
        ]
        return rates

    for name, weight in (("static", 1.0), ("uniform", 1 / len(recipe.names))):
        found[name] = measured(name, Mixture(views, Uniform(weight), "weights"), trained)
    for mode in MODES:
        found[f"mixture_{mode}"] = measured(f"mixture-{mode}", Mixture(views, routed.value, mode), [routed])
    for name, pieces in HEADS.items():
        fitted = fit(cached.value.bank, recipe.head.model_copy(update=pieces), recipe.run.seed).head
        model = Mixture(views, fitted.to(views.adapters.model.device), recipe.inference.mode)
        found[f"head_{name}"] = measured(f"head-{name}", model, [routed], "head", "inference")
    said = json.loads((experiment.folder / "head.json").read_text())
    return Compared(found, {"bank": said})
