"""What a steering is worth: random sets, the ranking's bottom, other settings, and SteerMoE beside another method."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data_prep.schema import Split
from trainer.detection.ranking import Ranking
from trainer.evaluation.suite import Suite
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.steering import Steering
from trainer.moe.steering_gate import Gate
from trainer.pipeline.experiment import Experiment
from trainer.pipeline.steer import detect_experts, perplexity, selected, sizes, steering
from trainer.recipe.sections import PairsSection
from trainer.recipe.steer import SteerSection
from trainer.run.step import JsonFile, Step
from trainer.runtime.console import say

RANDOM_DRAWS = 3


def smaller(suite: Suite, prompts: int) -> Suite:
    """The same questions on the first `prompts` test prompts of each kind, without capability."""

    def first(split: Split) -> Split:
        return Split(split.train, split.test[:prompts])

    whole = suite.corpus
    corpus = replace(
        whole, harmful=first(whole.harmful), benign=first(whole.benign), borderline=first(whole.borderline)
    )
    return Suite(corpus, suite.judge, suite.section, suite.data, capability=False)


def random_steering(experiment: Experiment[Any], how: Steering, seed: int) -> Steering:
    """As many experts forced in and out in every layer, drawn from the experts that `how` leaves alone."""
    named = [(layer, e) for experts in (how.activate, how.deactivate) for layer in experts for e in experts[layer]]
    drawn = ExpertSet(tuple(Member(*pair) for pair in sorted(named)), sizes(experiment)).random_like(seed).by_layer()
    generator = random.Random(seed)
    on: dict[int, tuple[int, ...]] = {}
    off: dict[int, tuple[int, ...]] = {}
    for layer, experts in drawn.items():
        shuffled = generator.sample(experts, len(experts))
        count = len(how.activate.get(layer, ()))
        on[layer], off[layer] = tuple(shuffled[:count]), tuple(shuffled[count:])
    return replace(how, activate=on, deactivate=off)


def controls(
    experiment: Experiment[Any],
    section: SteerSection,
    ranking: Ranking,
    how: Steering,
    after: Sequence[Step[Any]],
) -> dict[str, Any]:
    """Attack success under random sets and under the ranking's bottom, as many experts as `how` forces; ungated."""

    def make() -> dict[str, Any]:
        seed = experiment.recipe.run.seed
        sets = {f"random {i}": random_steering(experiment, how, seed + i) for i in range(RANDOM_DRAWS)}
        lowest = selected(experiment, section, ranking, section.n_pos, section.n_neg, bottom=True)
        sets["bottom"] = lowest.steering(section.strength)
        found = {}
        for name, other in sets.items():
            with steering(experiment, other):
                found[name] = experiment.suite.measure_asr(
                    experiment.model, experiment.chat, ("seen", "unseen"), label=f"control: {name}"
                )
        return {
            "random_control": found["random 0"],
            "random_draws": [found[f"random {i}"] for i in range(RANDOM_DRAWS)],
            "bottom_control": found["bottom"],
        }

    kept = JsonFile(experiment.folder / "stages" / "controls" / "metrics.json")
    return dict(experiment.step("controls", make, kept, reads=["steer", "evaluate"], after=after).value)


def sweep(
    experiment: Experiment[Any],
    section: SteerSection,
    asked: PairsSection,
    ranking: Ranking,
    gate: Gate | None,
    after: Sequence[Step[Any]],
) -> list[dict[str, Any]]:
    """The settings of `steer.sweep`, each ungated and, with a gate, gated: safety, over-refusal, fluency."""

    def make() -> list[dict[str, Any]]:
        if not _settings(section):
            return []
        suite = smaller(experiment.suite, section.sweep.prompts)
        prompts = [prompt.conversation for prompt in suite.corpus.benign.test]
        found = []
        for setting in _settings(section):
            for gated in (False, True) if gate else (False,):
                name = ", ".join(f"{key} {value}" for key, value in setting.items()) + (", gated" if gated else "")
                used = gate if gated else None
                try:
                    chosen = selected(experiment, section, ranking, setting["n_pos"], setting["n_neg"])
                    how = chosen.steering(setting["strength"])
                    with steering(experiment, how, used):
                        metrics = suite.measure(experiment.model, experiment.chat, label=f"sweep: {name}").metrics
                    fluency = perplexity(experiment, asked, how, used, prompts) if prompts else None
                except ValueError as error:
                    say(f"sweep: {name}: left out: {error}")
                    found.append({**setting, "gated": gated, "impossible": str(error)})
                    continue
                found.append({**setting, "gated": gated, "metrics": metrics, "perplexity": fluency})
        return found

    kept = JsonFile(experiment.folder / "stages" / "sweep" / "metrics.json")
    return list(experiment.step("sweep", make, kept, reads=["steer", "evaluate"], after=after).value)


def _settings(section: SteerSection) -> list[dict[str, Any]]:
    chosen: dict[str, Any] = {"n_pos": section.n_pos, "n_neg": section.n_neg, "strength": section.strength}
    settings = []
    for key in chosen:
        settings += [{**chosen, key: value} for value in getattr(section.sweep, key)]
    unique = {tuple(setting.values()): setting for setting in settings}
    return list(unique.values())


def steering_baseline(
    experiment: Experiment[Any], section: SteerSection, asked: PairsSection, after: Sequence[Step[Any]] = ()
) -> dict[str, Any]:
    """SteerMoE by the recipe's `steer` section beside another method: an M (docs/evaluation-json.md), ungated.

    `experiment.model` must be the original model. Goes into `evaluation.json` as `diagnostics.steering_baseline`.
    """

    def make() -> dict[str, Any]:
        ranking = detect_experts(experiment, section, asked).ranking
        selection = selected(experiment, section, ranking, section.n_pos, section.n_neg)
        with steering(experiment, selection.steering(section.strength)):
            return experiment.suite.measure(experiment.model, experiment.chat, label="steering baseline").metrics

    kept = JsonFile(experiment.folder / "stages" / "steering-baseline" / "metrics.json")
    reads = ["detect", "steer", "evaluate"]
    return dict(experiment.step("steering-baseline", make, kept, reads=reads, after=after).value)
