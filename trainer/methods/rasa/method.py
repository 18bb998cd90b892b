"""RASA: routing-aware safety alignment of Mixture-of-Experts models (arXiv 2602.04448).

    1. Identify the safety-critical experts: activated more by successful jailbreaks than by the same goals, refused.
       Delta[l, e] = P(e active in l | adversarial) - P(e active in l | anchor); the K largest over all layers.
    2. Repair those experts Theta alone, everything else frozen:
       L_SFT(Theta, Phi) = mean over rows of CE(refusal | jailbreak), plus, ours, a retain term on harmless rows
       lambda * KL(p_original || p) (`training/repair.py`).
    3. Train the routers Phi alone, so that a jailbroken prompt routes like its refused twin:
       L_router(Phi, Theta) = mean over layers and pairs of KL(stopgrad(p_anchor) || p_adversarial), plus, ours, a
       benign stream KL(p_original || p) (`training/consistency.py`).
    Alternate 2 and 3: min over Phi of L_router(Phi; argmin over Theta of L_SFT(Theta, Phi)).

Where we differ from the paper, and why, stands in docs/rasa.md; `recipes/*/rasa-faithful.yaml` is the paper's setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, reduce
from operator import or_
from typing import Any

from trainer.methods.rasa.footprint import may_change
from trainer.methods.rasa.identify import Critical, identify
from trainer.methods.rasa.mix import mixed
from trainer.methods.rasa.plan import check_shared_experts, planned, would_change
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.methods.rasa.report import report
from trainer.methods.rasa.stages import ALL_READ, ATTENTION_CONTROL, CONTROL, READS, Stages
from trainer.moe.footprint import Footprint
from trainer.pipeline import publish
from trainer.pipeline.experiment import Experiment, Opened, Step
from trainer.pipeline.measure import control, diagnose, measure, print_figures, shown
from trainer.pipeline.steer_controls import steering_baseline
from trainer.pipeline.train import refuse_what_the_engine_cannot, split, train_step, whole
from trainer.planning.planned import Planned
from trainer.recipe.section import TrainerSection
from trainer.runtime.console import say
from trainer.training.preflight import check_settings


class Rasa:
    """The method, from the base model to the repaired checkpoint and its evidence."""

    def run(self, opened: Opened[RasaRecipe]) -> None:
        experiment = _loaded(opened)
        recipe = experiment.recipe
        _say_what_trains(experiment)
        critical = identify(experiment)
        before = measure(experiment, "evaluate-before")
        steered = _steered(experiment, before) if recipe.evaluate.steering_baseline else {}
        stages, last = alternate(experiment, critical)
        after = measure(stages.experiment, "evaluate-after", [last])
        found = diagnose(stages.experiment, stages.model, after.value, stages.texts, [last, after])
        audit = export(stages, last)
        found |= {key: audit[key] for key in publish.MOVED}
        found |= _controls(stages, last) | {"steering_baseline": steered, "stages": stages.effects}
        evaluation = {"before": before.value, "after": after.value, "diagnostics": found}
        publish.publish(experiment, evaluation, report, lambda written: _print_summary(written, recipe))

    def detect(self, opened: Opened[RasaRecipe]) -> None:
        """Step 1 alone: up to the expert set, with the activations and the heat map."""
        experts = identify(_loaded(opened)).value.experts
        say(f"{len(experts)} of {experts.total} experts: {opened.folder / 'expert_set.json'}")

    def export(self, opened: Opened[RasaRecipe]) -> None:
        """Write the checkpoint of a run again, training what is not trained yet."""
        experiment = _loaded(opened)
        stages, last = alternate(experiment, identify(experiment))
        export(stages, last)
        say(f"checkpoint: {opened.folder / 'model'}")

    def planned(self, recipe: RasaRecipe) -> Planned:
        return planned(recipe)


def alternate(experiment: Experiment[RasaRecipe], critical: Step[Critical]) -> tuple[Stages, Step[Any]]:
    """Steps 2 and 3: expert repair and routing consistency in turn; what was done before is taken up."""
    mix = mixed(experiment, critical)
    experiment = whole(experiment)
    model = split(experiment, critical.value.experts, experiment.recipe.repair)
    stages = Stages(experiment, model, critical.value, mix.value)
    before: list[Step[Any]] = [critical, mix]
    for number, (round_, kind) in enumerate(experiment.recipe.training, start=1):
        name = f"{kind}-{round_}"
        step = train_step(experiment, name, number, model, stages.measured(kind), reads=READS[kind], after=before)
        _say_effect(name, step.value)
        stages.effects.append({"stage": name, **step.value})
        before = [step]
    return stages, before[-1]


def export(stages: Stages, last: Step[Any]) -> dict[str, Any]:
    """The checkpoint and the proof that nothing outside the stages' footprints moved."""
    experiment, experts = stages.experiment, stages.critical.experts
    kinds = dict.fromkeys(kind for _, kind in experiment.recipe.training)
    declared: Iterable[Footprint] = [
        may_change(experiment.recipe, experiment.backbone, experts, kind) for kind in kinds
    ]
    return publish.export_and_audit(
        experiment,
        experiment.recipe.export,
        lambda: publish.stock_of(experiment, stages.model, experiment.recipe.repair.lora_alpha),
        reduce(or_, declared, Footprint()),
        [last],
        experts if experiment.recipe.repair.scope == "experts" else None,
        trained=stages.model,
    )


def _controls(stages: Stages, last: Step[Any]) -> dict[str, Any]:
    """The same repair elsewhere: what the choice of experts is worth, and what experts are worth at all."""
    recipe = stages.experiment.recipe
    kinds = {
        "random_control": (recipe.evaluate.random_control, CONTROL, stages.on_random_experts),
        "attention_control": (recipe.evaluate.attention_control, ATTENTION_CONTROL, stages.on_attention),
    }
    found: dict[str, Any] = {}
    for key, (wanted, name, train) in kinds.items():
        found[key] = {}
        if wanted and recipe.repair.scope == "experts":
            identity = stages.experiment.identity(name, ALL_READ, [last])
            whole = key == "attention_control"  # worth its time where it costs the harmless less than experts do
            found[key] = control(stages.experiment, name, partial(train, identity), ALL_READ, [last], whole=whole)
    return found


def _steered(experiment: Experiment[RasaRecipe], before: Step[Any]) -> dict[str, Any]:
    return steering_baseline(experiment, experiment.recipe.steer, experiment.recipe.detect, [before])


def _loaded(opened: Opened[RasaRecipe]) -> Experiment[RasaRecipe]:
    recipe = opened.recipe
    sections: dict[str, TrainerSection] = {kind: getattr(recipe, kind) for _, kind in recipe.training}
    refuse_what_the_engine_cannot(sections)
    experiment = opened.load()
    check_settings(sections, opened.folder, experiment.model)
    check_shared_experts(recipe, experiment.model.config.model_type, experiment.backbone.shared_layers)
    return experiment


def _say_what_trains(experiment: Experiment[RasaRecipe]) -> None:
    plan = would_change(experiment.recipe, experiment.backbone)
    say(
        f"preflight: {experiment.model.config.model_type}, {len(experiment.backbone)} MoE layers; trains "
        f"{plan['experts']} of {plan['of_experts']} experts, {plan['parameters']:,} of {plan['of_parameters']:,} "
        "parameters"
    )


def _say_effect(stage: str, effect: dict[str, Any]) -> None:
    name = effect["works_on"]
    words = name.replace("_", " ")
    went = f"{words} {effect[name]['before']:.4f} -> {effect[name]['after']:.4f}"
    say(f"{stage}: {went}" if effect["acted"] else f"{stage}: NO EFFECT, {went}")


def _print_summary(evaluation: dict[str, Any], recipe: RasaRecipe) -> None:
    found = evaluation["diagnostics"]
    rows: list[list[object]] = []
    for key, words in (("random_control", "matched random experts"), ("attention_control", "attention alone")):
        if found[key]:
            other = found[key]["asr_unseen"]
            rows.append([f"asr_unseen, {words}", "", shown(other), other["n"]])
    for name in ("router_restore_gap", "topk_flip_rate", "gate_weights_changed"):
        rows.append([name, "", f"{found[name]:.3f}", ""])
    share = found["experts_changed"] / found["experts_total"]
    changed = f"{found['experts_changed']} of {found['experts_total']} ({share:.1%})"
    rows.append(["experts_changed", "", changed, ""])
    if found.get("shared_experts_changed"):
        rows.append(["shared_experts_changed", "", str(found["shared_experts_changed"]), ""])
    rows.append(["untouched_identical", "", str(found["untouched_identical"]), ""])
    print_figures(recipe, {"before": evaluation["before"], "after": evaluation["after"]}, rows)


METHOD = Rasa()
