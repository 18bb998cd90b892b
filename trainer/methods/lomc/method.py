"""LoMC-style correction: fewer wrong refusals by a rank-one edit inside a compact support (after arXiv 2606.13709).

    1. Support: the experts (and, if asked, other writers in their layers) that wrongly refused harmless prompts
       activate more than answered ones, under a budget.
    2. Directions: the states of wrongly refused prompts are clustered; each prototype is taken from the answered
       prompts' mean, made orthogonal to harmful refusal, w - (w.r / r.r) r, and all are aggregated to one unit vector
       d_l per layer. Their number is chosen with lambda.
    3. Correction, for units u of the support only: W'[l,u] = W[l,u] - lambda d_l d_l^T W[l,u]. lambda is chosen on
       held-out prompts under bounds on KL, on harmful refusal and on answers to harmless prompts.
    4. Rounds: directions of what is refused still, corrected in the same support and within the same bounds.

The paper's abstract gives this order and no formula; what is our reading stands in docs/lomc.md. It is used in one
direction: towards fewer wrong refusals. Where safety falls beyond `correct.max_loss`, nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial, reduce
from operator import or_
from typing import Any

import torch

from trainer.methods.lomc.correct import ablation, benign_kl, reach, search
from trainer.methods.lomc.groups import Groups, groups
from trainer.methods.lomc.guard import Loss, SafetyLostError, losses
from trainer.methods.lomc.identify import identify
from trainer.methods.lomc.plan import planned
from trainer.methods.lomc.recipe import LomcRecipe
from trainer.methods.lomc.report import report
from trainer.methods.lomc.rounds import all_rounds, later_rounds
from trainer.model.load import load
from trainer.moe.backbone import Backbone
from trainer.moe.rank_one import Correction, correct, corrected
from trainer.moe.writers import Writer
from trainer.pipeline import publish
from trainer.pipeline.experiment import Experiment, JsonFile, Opened, Step
from trainer.pipeline.measure import changes, measure, print_figures
from trainer.planning.planned import Planned
from trainer.runtime.console import is_main_process, say
from trainer.runtime.processes import from_rank_0


class Lomc:
    """The method, from the base model to the corrected checkpoint and its evidence, or to the refusal to write one."""

    def run(self, opened: Opened[LomcRecipe]) -> None:
        experiment = opened.load()
        recipe = experiment.recipe
        grouped = groups(experiment)
        located = identify(experiment, grouped)
        before = measure(experiment, "evaluate-before")
        found = search(experiment, located, grouped)
        best = found.value["chosen"]
        if best is None:
            raise SafetyLostError(
                f"correct.strengths: none of {recipe.correct.strengths} reduces wrong refusals within max_kl "
                f"{recipe.correct.max_kl:g} and max_loss {recipe.correct.max_loss:g} on held-out prompts "
                f"({opened.folder / 'strength.json'}); nothing is written"
            )
        later = later_rounds(experiment, located, grouped, found)
        corrections = all_rounds(located.value, best, later.value)
        writers, known = located.value.writers, [located, found, later, before]
        after, reached = _measured(experiment, writers, corrections, grouped.value.held, known)
        lost = losses(from_rank_0(changes(experiment)), recipe.correct.max_loss)
        kept = all(one.within for one in lost)
        diagnostics: dict[str, Any] = {}
        if kept:
            audit = _export(experiment, writers, corrections, after)
            diagnostics |= {key: audit[key] for key in publish.MOVED}
        tried = ablation(experiment, located, grouped, found) if recipe.evaluate.ablation else {}
        diagnostics["correction"] = {
            "written": kept,
            "prototypes": best["prototypes"],
            "strength": best["strength"],
            "later": [one.record() for one in later.value],
            "kinds": corrections[0].kinds,
            "footprint": reached.value["footprint"],
            "kl": reached.value["kl"],
            "safety": [asdict(one) for one in lost],
            "tried": found.value["tried"],
            "ablation": tried,
            **located.value.about,
        }
        evaluation = {"before": before.value, "after": after.value, "diagnostics": diagnostics}
        publish.publish(experiment, evaluation, report, lambda written: _print_summary(written, recipe))
        if not kept:
            raise SafetyLostError(_why_not(lost, recipe.correct.max_loss))

    def detect(self, opened: Opened[LomcRecipe]) -> None:
        """Steps 1 and 2 alone: up to the support and the directions."""
        experiment = opened.load()
        located = identify(experiment, groups(experiment)).value
        kinds = ", ".join(experiment.recipe.detect.kinds)
        say(f"{len(located.units)} units of {kinds}: {opened.folder / 'support.json'}")

    def export(self, opened: Opened[LomcRecipe]) -> None:
        """Write the checkpoint of a finished run again.

        Raises:
            UserError: the run wrote none.
        """
        self.run(opened)

    def planned(self, recipe: LomcRecipe) -> Planned:
        return planned(recipe)


def _measured(
    experiment: Experiment[LomcRecipe],
    writers: Sequence[Writer],
    corrections: Sequence[Correction],
    held: Groups,
    before: list[Step[Any]],
) -> tuple[Step[dict[str, Any]], Step[dict[str, Any]]]:
    """The figures under the corrections, and how far they reached."""
    reads = ["correct", "detect"]
    edited = partial(corrected, experiment.backbone, writers, corrections)
    with edited() as units:
        after = measure(experiment, "evaluate-after", before, reads=reads)
    if units.unchanged:
        say(f"correct: {len(units.unchanged)} units keep their bytes: the change is smaller than their type's spacing")

    def make() -> dict[str, Any]:
        return {"footprint": reach(units), "kl": benign_kl(experiment, edited, held.right)}

    kept = JsonFile(experiment.folder / "stages" / "reach" / "reach.json")
    return after, experiment.step("reach", make, kept, reads=reads, after=before)


def _export(
    experiment: Experiment[LomcRecipe], writers: Sequence[Writer], corrections: Sequence[Correction], after: Step[Any]
) -> dict[str, Any]:
    def stock() -> Any:
        """On rank 0 a fresh copy of the base, corrected."""
        if not is_main_process():
            return None
        model = load(experiment.recipe.model, torch.device("cpu"))[0]
        for correction in corrections:
            correct(Backbone.of(model), writers, correction)
        return model

    return publish.export_and_audit(
        experiment,
        experiment.recipe.export,
        stock,
        reduce(or_, (correction.footprint(writers) for correction in corrections)),
        [after],
        reads=["correct", "detect"],
    )


def _why_not(lost: list[Loss], bound: float) -> str:
    beyond = max((one for one in lost if not one.within), key=lambda one: one.worst)
    return (
        f"correct.max_loss: {bound:g}; {beyond.figure} got worse by {beyond.change:.3f}, 95 % interval up to "
        f"{beyond.worst:.3f}; nothing was written"
    )


def _print_summary(evaluation: dict[str, Any], recipe: LomcRecipe) -> None:
    found = evaluation["diagnostics"]["correction"]
    reach_ = found["footprint"]
    strengths = ", ".join(f"{one['strength']:g}" for one in (found, *found["later"]))
    rows: list[list[object]] = [
        ["corrected", "", f"{', '.join(found['kinds'])}; strength {strengths}", ""],
        ["experts, layers", "", f"{reach_['experts']} in {reach_['layers']}", ""],
        ["parameters touched", "", f"{reach_['parameters'] / reach_['of_parameters']:.2%}", ""],
        ["relative change of them", "", f"{reach_['relative_change']:.4f}", ""],
        ["KL on harmless replies", "", f"{found['kl']:.4f}", ""],
        ["written", "", str(found["written"]), ""],
    ]
    print_figures(recipe, {"before": evaluation["before"], "after": evaluation["after"]}, rows)


METHOD = Lomc()
