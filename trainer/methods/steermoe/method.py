"""SteerMoE: detect behaviour-linked experts and steer them at inference (arXiv 2509.09660).

    1. Count on paired inputs how often each expert is active: x1 shows the wanted behaviour, x2 the opposite.
    2. Rank all experts by their risk difference Delta = a1/(a1+d1) - a2/(a2+d2); the top ones are activated (A+) or
       deactivated (A-).
    3. Force them in and out of every token's top-k while the model runs: s = log_softmax(z), A+ gets s_max + eps, A-
       gets s_min - eps. Nothing is trained, no weight changes.

docs/steermoe.md says how to use the result and what we add: a graded strength, a gate on the input, the controls.
"""

from __future__ import annotations

from typing import Any

from data_prep.errors import UserError
from trainer.methods.steermoe.identify import Steered, identify
from trainer.methods.steermoe.plan import planned
from trainer.methods.steermoe.recipe import SteermoeRecipe
from trainer.methods.steermoe.report import report
from trainer.pipeline import publish
from trainer.pipeline.experiment import Experiment, JsonFile, Opened, Step
from trainer.pipeline.measure import measure, print_figures, shown
from trainer.pipeline.steer import perplexity, proof, steering
from trainer.pipeline.steer_controls import controls, sweep
from trainer.planning.planned import Planned
from trainer.runtime.console import say, table

PROOF_PROMPTS = 16


class Steermoe:
    """The method, from the base model to `steering.json` and its evidence."""

    def run(self, opened: Opened[SteermoeRecipe]) -> None:
        experiment = opened.load()
        recipe = experiment.recipe
        found = identify(experiment)
        before = measure(experiment, "evaluate-before")
        how, gate = found.value.file.steering, found.value.file.gate
        with steering(experiment, how, gate):
            after = ungated = measure(experiment, "evaluate-after", [found])
        if gate:
            with steering(experiment, how):
                ungated = measure(experiment, "evaluate-ungated", [found])
        diagnostics = diagnose(experiment, found.value, [after])
        diagnostics["steering"]["ungated"] = ungated.value
        if recipe.evaluate.random_control and experiment.suite.attacks:
            diagnostics |= controls(experiment, recipe.steer, found.value.ranking, how, [found])
        tried = sweep(experiment, recipe.steer, recipe.detect, found.value.ranking, gate, [found])
        diagnostics["steering"]["sweep"] = tried
        evaluation = {"before": before.value, "after": after.value, "diagnostics": diagnostics}
        publish.publish(experiment, evaluation, report, lambda written: _print_summary(written, recipe))
        say(f"steering: {opened.folder / 'steering.json'}")

    def detect(self, opened: Opened[SteermoeRecipe]) -> None:
        """Steps 1 and 2 alone: up to `steering.json`, with the activations and the heat map."""
        identify(opened.load())
        say(f"steering: {opened.folder / 'steering.json'}")

    def export(self, opened: Opened[SteermoeRecipe]) -> None:
        """Steering changes no weight, so there is no checkpoint to write.

        Raises:
            UserError: always; names the file to use instead.
        """
        raise UserError(
            f"{opened.folder}: a steermoe run has no checkpoint; its result is {opened.folder / 'steering.json'}"
        )

    def planned(self, recipe: SteermoeRecipe) -> Planned:
        return planned(recipe)


def diagnose(experiment: Experiment[SteermoeRecipe], steered: Steered, after: list[Step[Any]]) -> dict[str, Any]:
    """Proof from recorded routing, and fluency: perplexity of the replies under the original model."""

    def make() -> dict[str, Any]:
        how, corpus = steered.file.steering, experiment.corpus
        shown_prompts = [goal.conversation for goal in (corpus.harmful.train or corpus.benign.test)[:PROOF_PROMPTS]]
        if seen := corpus.wrappers_of("seen"):
            shown_prompts = [seen[0].wrap(asked) for asked in shown_prompts]
        evidence = proof(experiment, how, shown_prompts) if shown_prompts else {"topk_flip_rate": None}
        if how.strength == 1.0 and evidence.get("forced") is False:
            raise RuntimeError("steering: an expert to activate did not run, or one to deactivate did")
        benign = [prompt.conversation for prompt in corpus.benign.test]
        fluency = None
        if benign:
            asked, gate = experiment.recipe.detect, steered.file.gate
            fluency = {
                "before": perplexity(experiment, asked, None, None, benign),
                "after": perplexity(experiment, asked, how, gate, benign),
            }
        return {
            "topk_flip_rate": evidence.pop("topk_flip_rate"),
            "steering": {
                "strength": how.strength,
                **evidence,
                "gate": steered.file.gate.about if steered.file.gate else None,
                "perplexity": fluency,
            },
        }

    kept = JsonFile(experiment.folder / "stages" / "diagnose" / "diagnostics.json")
    return dict(experiment.step("diagnose", make, kept, reads=["steer", "evaluate"], after=after).value)


def _print_summary(evaluation: dict[str, Any], recipe: SteermoeRecipe) -> None:
    found = evaluation["diagnostics"]
    columns = {"before": evaluation["before"], "ungated": found["steering"]["ungated"], "after": evaluation["after"]}
    fluency, more = found["steering"]["perplexity"], []
    if fluency:
        more.append(["perplexity of replies", f"{fluency['before']:.2f}", "", f"{fluency['after']:.2f}", ""])
    print_figures(recipe, columns, more)
    if "bottom_control" in found:
        sets = {f"random {i}": metrics for i, metrics in enumerate(found["random_draws"])}
        sets["bottom"] = found["bottom_control"]
        rows = [[name, shown(m["asr_seen"]), shown(m["asr_unseen"])] for name, m in sets.items()]
        table("controls, as many experts", ["set", "asr_seen", "asr_unseen"], rows)
    measured = [row for row in found["steering"]["sweep"] if "metrics" in row]
    if measured:
        names = ["asr_seen", "asr_unseen", "over_refusal", "benign_compliance", "degenerate"]
        keys = ["n_pos", "n_neg", "strength", "gated"]
        rows = [
            [
                *(str(row[key]) for key in keys),
                *(f"{row['metrics'][name]['rate']:.3f}" if name in row["metrics"] else "" for name in names),
                f"{row['perplexity']:.2f}" if row["perplexity"] is not None else "",
            ]
            for row in measured
        ]
        table("sweep", [*keys, *names, "perplexity"], rows)


METHOD = Steermoe()
