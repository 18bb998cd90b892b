"""What a run of LoMC holds and may change, for the planner; nothing is trained and nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.detection.selection import resolve_k
from trainer.methods.lomc.recipe import LomcRecipe
from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint
from trainer.moe.rank_one import Correction, Unit
from trainer.moe.writers import find_writers
from trainer.planning import parts, steps
from trainer.planning.planned import Planned, PlannedStage, Saving
from trainer.planning.savings import fewer_prompts

PROMPT = 512
"""Positions that a prompt is taken to have at most, as `repair.max_length` is by default."""


def planned(recipe: LomcRecipe) -> Planned:
    return LomcPlanned(recipe)


@dataclass(frozen=True)
class LomcPlanned:
    """`planned.Planned` of a LoMC recipe."""

    recipe: LomcRecipe

    def stages(self) -> list[PlannedStage]:
        evaluate, detect = self.recipe.evaluate, self.recipe.detect
        asked = steps.replies(evaluate.batch_size, PROMPT + detect.max_new_tokens)
        measured = steps.replies(evaluate.batch_size, PROMPT + evaluate.max_new_tokens)
        # Besides: the copy that is exported, and the one that is read back.
        return [PlannedStage("detect", asked), PlannedStage("evaluate", measured, copies=2, copies_where_split=2)]

    def footprint(self, backbone: Backbone) -> Footprint:
        """The experts taken for the support before detection says which, spread evenly; others in their layers."""
        detect, writers = self.recipe.detect, find_writers(backbone)
        number = resolve_k(detect.top_k, backbone.total_experts, None, len(backbone))
        experts = parts.spread_evenly(number, backbone)
        layers = sorted(experts.by_layer())[: detect.layers]
        units = [
            Unit(m.layer, "experts", m.expert) for m in experts if m.layer in layers and "experts" in detect.kinds
        ]
        units += [
            Unit(w.layer, w.kind) for w in writers if w.kind in detect.kinds and not w.is_fused and w.layer in layers
        ]
        return Correction(tuple(units), None, 1.0).footprint(writers)

    def savings(self) -> Iterator[Saving]:
        for words, recipe, changed in fewer_prompts(self.recipe, ("detect", "evaluate")):
            yield Saving(words, LomcPlanned(recipe), changed)
