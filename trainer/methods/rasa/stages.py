"""RASA, steps 2 and 3: what each training stage trains, and on which rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.schema import Conversation
from trainer.evaluation.diagnostics import Twins, routing_gap
from trainer.methods.rasa.identify import Critical
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.model.reply import Reply
from trainer.moe.expert_set import ExpertSet
from trainer.moe.trainable import TrainableModel
from trainer.pipeline.experiment import Experiment
from trainer.pipeline.train import Train, split
from trainer.recipe.sections import RepairSection
from trainer.training.consistency import make_routing_consistent
from trainer.training.loop import StageResult
from trainer.training.repair import repair_experts
from trainer.training.rows import Mix, consistency_rows

READS = {"repair": ["repair"], "consistency": ["repair", "consistency"]}
"""The recipe's sections that a stage depends on, besides the stages before it."""
ALL_READ = ["repair", "consistency", "schedule", "evaluate"]
CONTROL, ATTENTION_CONTROL = "control", "attention-control"
"""Steps that train a second model, to compare with."""
SAMPLE = 32
"""Pairs on which the effect of every stage is measured."""
ACTS = 0.1
"""Smallest relative change of what a stage works on that is called an effect."""
WORKS_ON = {"repair": "refusal_loss", "consistency": "routing_gap"}
SHOWN = 64
"""Texts of a kind on which routing drift is measured."""


def effect_of(kind: str, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Every figure before and after a stage, and whether what it works on fell by a tenth or more (`acted`)."""
    figures = {name: {"before": before[name], "after": after[name]} for name in before}
    name = WORKS_ON[kind]
    return {"kind": kind, **figures, "works_on": name, "acted": after[name] <= (1 - ACTS) * before[name]}


@dataclass
class Stages:
    """The stages of one repair."""

    experiment: Experiment[RasaRecipe]
    model: TrainableModel
    critical: Critical
    mix: Mix
    effects: list[dict[str, Any]] = field(default_factory=list)
    """What each stage did, in order: `Stages.measured`."""

    @property
    def kinds(self) -> dict[str, Train]:
        return {"repair": self.repair, "consistency": self.consistency}

    def measured(self, kind: str) -> Train:
        """A stage with what it did to the routing gap and to the refusals (`effect_of`)."""

        def train(folder: Path, identity: str) -> StageResult:
            before = self._gap()
            result = self.kinds[kind](folder, identity)
            return replace(result, effect=effect_of(kind, before, self._gap()))

        return train

    def _gap(self) -> dict[str, float]:
        twins = [
            Twins(t.goal.conversation, t.wrapper.wrap(t.goal.conversation), t.refusal)
            for t in self.critical.targets[:SAMPLE]
        ]
        return routing_gap(self.model, self.experiment.chat, twins)

    def repair(self, folder: Path, identity: str) -> StageResult:
        """Minimise L_SFT over the critical experts at the present router."""
        recipe, mix = self.experiment.recipe, self.mix
        return repair_experts(
            self.model,
            self.experiment.chat,
            mix.rows,
            recipe.repair,
            folder,
            recipe.run.seed,
            identity,
            mix.left_out,
        )

    def consistency(self, folder: Path, identity: str) -> StageResult:
        """Minimise L_router over the routers at the present experts."""
        recipe, chat = self.experiment.recipe, self.experiment.chat
        rows = consistency_rows(self.critical.targets, self.mix.rows, recipe.consistency.benign_weight)
        longest = recipe.repair.trainer_arguments["max_length"]
        return make_routing_consistent(
            self.model, chat, rows, recipe.consistency, folder, recipe.run.seed, identity, longest
        )

    def texts(self) -> list[tuple[Conversation, Reply]]:
        """Jailbroken and harmless (prompt, reply) turns on which routing drift is measured."""
        rows = self.mix.rows
        jailbreaks = [(row.prompt, row.reply) for row in rows if row.source == "jailbreak"][:SHOWN]
        return jailbreaks + [(row.prompt, row.reply) for row in rows if row.stream == "retain"][:SHOWN]

    def on_random_experts(self, identity: str) -> Experiment[RasaRecipe]:
        """A fresh copy of the model after the same schedule, rows and seed on matched random experts."""
        experts = self.critical.experts.random_like(self.experiment.recipe.run.seed)
        return self._anew(CONTROL, experts, self.experiment.recipe.repair, identity)

    def on_attention(self, identity: str) -> Experiment[RasaRecipe]:
        """The same on attention alone, as much of it as the repair trains beside experts, or all."""
        alone = self.experiment.recipe.repair.model_copy(update={"scope": "attention", "lora_rank": None})
        return self._anew(ATTENTION_CONTROL, self.critical.experts, alone, identity)

    def _anew(self, name: str, experts: ExpertSet, repair: RepairSection, identity: str) -> Experiment[RasaRecipe]:
        copy = self.experiment.reloaded()
        other = Stages(copy, split(copy, experts, repair), self.critical, self.mix)
        for number, (_, kind) in enumerate(copy.recipe.training):
            other.kinds[kind](copy.folder / "stages" / name / str(number), identity)
        return copy
