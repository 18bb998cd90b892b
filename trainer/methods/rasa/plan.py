"""What a run of RASA holds, trains and may change, for the planner and for `inspect`; nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain

from data_prep.errors import UserError
from trainer.detection.selection import resolve_k
from trainer.methods.rasa.footprint import may_change
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet
from trainer.moe.footprint import Footprint
from trainer.moe.trainable import TrainableModel
from trainer.planning import parts, steps
from trainer.planning.planned import Planned, PlannedStage, Saving, Training
from trainer.planning.savings import Change, fewer_prompts, single_rows
from trainer.planning.workload import batch_rows
from trainer.training.under_repair import under_repair


def planned(recipe: RasaRecipe) -> Planned:
    return RasaPlanned(recipe)


def would_change(recipe: RasaRecipe, backbone: Backbone) -> dict[str, int]:
    """How many experts and parameters of a stock model a run may change; raises as `critical` does."""
    return parts.would_change(planned(recipe).footprint(backbone), backbone)


def check_shared_experts(recipe: RasaRecipe, model_type: str, layers: Collection[int]) -> None:
    """Refuse an edit of shared experts on a model that has none; `layers` are those that have one.

    Raises:
        UserError: names the key and the model's type.
    """
    if recipe.detect.shared_experts and not layers:
        raise UserError(f"detect.shared_experts: found true, but {model_type} has no shared experts; allowed: false")


def critical(recipe: RasaRecipe, backbone: Backbone) -> ExpertSet:
    """The experts taken for critical before detection says which: `detect.top_k` of them, spread evenly.

    Raises:
        UserError: `detect` selects none or all of the model's experts, or shared experts that it does not have.
    """
    detect = recipe.detect
    number = resolve_k(detect.top_k, backbone.total_experts, detect.per_layer_cap, len(backbone))
    check_shared_experts(recipe, backbone.model.config.model_type, backbone.shared_layers)
    experts = parts.spread_evenly(number, backbone)
    return experts.with_shared(backbone.shared_layers) if detect.shared_experts else experts


def row_counts(recipe: RasaRecipe) -> tuple[int, int]:
    """Repair rows with a refusal and rows to retain, from the most pairs that detection may keep."""
    pairs, mix = recipe.detect.max_pairs, recipe.repair
    around = round(mix.recombined * pairs) + round(mix.robust * pairs)
    retained = round(mix.wrapped_benign * (pairs + around))
    retained += round(mix.plain_benign * pairs) + round(mix.borderline * pairs)
    return pairs + around + round(mix.anchors * pairs), retained


def retained_rows(recipe: RasaRecipe) -> int:
    """Rows of a repair batch that are compared with the original model, as many as the mix has on average."""
    section = recipe.repair
    if section.retain_loss != "kl" or section.retain_weight == 0:
        return 0
    refused, retained = row_counts(recipe)
    return math.ceil(batch_rows(section) * retained / (refused + retained))


@dataclass(frozen=True)
class RasaPlanned:
    """`planned.Planned` of a RASA recipe."""

    recipe: RasaRecipe

    def stages(self) -> list[PlannedStage]:
        trained = {"repair": self._repair, "consistency": self._consistency}
        return [self._detect(), *(trained[kind]() for kind in self._kinds), self._evaluate()]

    def footprint(self, backbone: Backbone) -> Footprint:
        experts, found = critical(self.recipe, backbone), Footprint()
        for kind in self._kinds:
            found |= may_change(self.recipe, backbone, experts, kind)
        return found

    def savings(self) -> Iterator[Saving]:
        ask = ("detect", "evaluate")
        changes = chain(single_rows(self.recipe, self._kinds), self._of_the_method(), fewer_prompts(self.recipe, ask))
        for words, recipe, changed in changes:
            yield Saving(words, RasaPlanned(recipe), changed)

    def _of_the_method(self) -> Iterator[Change[RasaRecipe]]:
        repair, evaluate = self.recipe.repair, self.recipe.evaluate
        if "repair" not in self._kinds or repair.scope == "full":
            return
        if repair.lora_rank is None and repair.scope == "experts":
            lora = repair.model_copy(update={"lora_rank": 8})
            yield "repair.lora_rank=8", self.recipe.model_copy(update={"repair": lora}), self._kinds
        on = [name for name in ("random_control", "attention_control") if getattr(evaluate, name)]
        if on:
            without = evaluate.model_copy(update=dict.fromkeys(on, False))
            words = " ".join(f"evaluate.{name}=false" for name in on)
            yield words, self.recipe.model_copy(update={"evaluate": without}), ()

    # --- the stages -------------------------------------------------------------------------------

    @property
    def _kinds(self) -> tuple[str, ...]:
        """The training stages, in their order."""
        return tuple(dict.fromkeys(kind for _, kind in self.recipe.training))

    @property
    def _length(self) -> int:
        """Positions of the longest row: `repair.max_length`, which the other stages' texts are taken to keep to."""
        length = self.recipe.repair.trainer_arguments["max_length"]
        if length is None:
            raise UserError("repair.max_length: found null; a plan needs the length of the longest row, such as 512")
        return int(length)

    @property
    def _controls(self) -> int:
        """The repaired model stays beside a control's, which goes through the same stages; one control at a time."""
        evaluate = self.recipe.evaluate
        return int((evaluate.random_control or evaluate.attention_control) and self.recipe.repair.scope == "experts")

    def _detect(self) -> PlannedStage:
        detect = self.recipe.detect
        if detect.score == "saliency":
            step = steps.saliency(detect.batch_size, self._length)
            return PlannedStage("detect", step, steps.experts_with_gradients)
        # Replies are asked for in the batches of the evaluation.
        rows = self.recipe.evaluate.batch_size
        return PlannedStage("detect", steps.replies(rows, self._length + detect.max_new_tokens))

    def _repair(self) -> PlannedStage:
        recipe, section, length = self.recipe, self.recipe.repair, self._length
        response = min(length - 1, recipe.detect.max_new_tokens)  # refusals and answers are the model's own

        def hold(backbone: Backbone) -> TrainableModel:
            model = under_repair(backbone, critical(recipe, backbone), section)
            model.train_experts(routers=section.train_gates)
            return model

        return PlannedStage(
            "repair",
            steps.repair(section, batch_rows(section), length, response, retained_rows(recipe)),
            hold,
            Training(section, sum(row_counts(recipe)), length, rounds=recipe.schedule.rounds),
            copies=self._controls,
            copies_where_split=1,  # the stock model, beside the one whose experts are split out
        )

    def _consistency(self) -> PlannedStage:
        recipe, section, length = self.recipe, self.recipe.consistency, self._length

        def hold(backbone: Backbone) -> TrainableModel:
            model = under_repair(backbone, critical(recipe, backbone), recipe.repair)
            model.train_routers()
            return model

        # A row has a jailbroken text, its refused twin and a harmless one.
        training = Training(section, recipe.detect.max_pairs, length, passes=3, rounds=recipe.schedule.rounds)
        return PlannedStage(
            "consistency",
            steps.consistency(section, batch_rows(section), length),
            hold,
            training,
            copies=self._controls,
            copies_where_split=1,
        )

    def _evaluate(self) -> PlannedStage:
        section = self.recipe.evaluate

        def hold(backbone: Backbone) -> TrainableModel:
            model = under_repair(backbone, critical(self.recipe, backbone), self.recipe.repair)
            model.model.requires_grad_(False)
            return model

        step = steps.replies(section.batch_size, self._length + section.max_new_tokens)
        # Besides: the model of the random control, the one reloaded at export, or the stock one.
        return PlannedStage("evaluate", step, hold, copies=1, copies_where_split=1)
