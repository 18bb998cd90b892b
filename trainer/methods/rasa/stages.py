"""RASA, steps 2 and 3: what each training stage trains, and on which rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from data_prep.schema import Conversation
from trainer.methods.rasa.identify import Critical
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.model.reply import Reply
from trainer.moe.trainable import TrainableModel
from trainer.pipeline.experiment import Experiment
from trainer.pipeline.train import Train, split
from trainer.training.consistency import make_routing_consistent
from trainer.training.loop import StageResult
from trainer.training.repair import TrainingRow, repair_experts
from trainer.training.rows import consistency_rows, repair_rows

READS = {"repair": ["repair"], "consistency": ["repair", "consistency"]}
"""The recipe's sections that a stage depends on, besides the stages before it."""
ALL_READ = ["repair", "consistency", "schedule", "evaluate"]
SHOWN = 64
"""Texts of a kind on which routing drift is measured."""


@dataclass
class Stages:
    """The stages of one repair; the rows are made once, on first use, from the original model's replies."""

    experiment: Experiment[RasaRecipe]
    model: TrainableModel
    critical: Critical
    made: list[TrainingRow] | None = None

    @property
    def kinds(self) -> dict[str, Train]:
        return {"repair": self.repair, "consistency": self.consistency}

    def repair(self, folder: Path, identity: str) -> StageResult:
        """Minimise L_SFT over the critical experts at the present router."""
        recipe, chat = self.experiment.recipe, self.experiment.chat
        return repair_experts(self.model, chat, self.rows(), recipe.repair, folder, recipe.run.seed, identity)

    def consistency(self, folder: Path, identity: str) -> StageResult:
        """Minimise L_router over the routers at the present experts."""
        recipe, chat = self.experiment.recipe, self.experiment.chat
        rows = consistency_rows(self.critical.targets, self.rows(), recipe.consistency.benign_weight)
        return make_routing_consistent(self.model, chat, rows, recipe.consistency, folder, recipe.run.seed, identity)

    def rows(self) -> list[TrainingRow]:
        """Rows of the repair stage, from the original model's own replies."""
        if self.made is None:
            with self.model.original() as original:
                self.made = self._answered_by(original.model)
        return self.made

    def _answered_by(self, original: PreTrainedModel) -> list[TrainingRow]:
        experiment, recipe = self.experiment, self.experiment.recipe
        return repair_rows(
            self.critical.targets,
            self.critical.refusals,
            experiment.corpus,
            recipe.repair,
            partial(experiment.ask, section=recipe.detect, model=original),
            experiment.judge,
            recipe.run.seed,
        )

    def texts(self) -> list[tuple[Conversation, Reply]]:
        """Jailbroken and harmless (prompt, reply) turns on which routing drift is measured."""
        rows = self.rows()
        jailbreaks = [(row.prompt, row.reply) for row in rows if row.source == "jailbreak"][:SHOWN]
        return jailbreaks + [(row.prompt, row.reply) for row in rows if row.stream == "retain"][:SHOWN]

    def on_random_experts(self, identity: str) -> Experiment[RasaRecipe]:
        """A fresh copy of the model after the same schedule, rows and seed on matched random experts."""
        copy = self.experiment.reloaded()
        seed, repair = copy.recipe.run.seed, copy.recipe.repair
        # Asked before the split: the copy is the original model.
        rows = self.made if self.made is not None else self._answered_by(copy.model)
        other = Stages(copy, split(copy, self.critical.experts.random_like(seed), repair), self.critical, rows)
        for number, (_, kind) in enumerate(copy.recipe.training):
            other.kinds[kind](copy.folder / "stages" / "control" / str(number), identity)
        return copy
