"""AlignX: prompt-injected axis adapters and a mixture of calibrated experts over them (after arXiv 2602.07381).

    1. One LoRA adapter per axis from the same base: a pass on plain prompts, then one on the same prompts with the
       axis' prefix injected, on the same adapter. L = CE on the response.
    2. Features of a prompt: hidden states f_0 of the base and f_i under each adapter.
    3. MoCaE head: alpha = softmax((W_r f + .6 fractal + .4 natural) / tau), calibrated on held-out prompts.
    4. A prompt is routed once and answered by the adapters, each weighed by its alpha.

The paper's abstract and settings are known, its equations are not: what is our reading stands in docs/alignx.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from data_prep.errors import UserError
from trainer.engines.table import names as engine_names
from trainer.methods.alignx.axes import axes_of
from trainer.methods.alignx.compare import Compared, compare
from trainer.methods.alignx.costs import costs
from trainer.methods.alignx.deliver import deliver, static_merge
from trainer.methods.alignx.evaluate import drops, mean_rate, measure_axes
from trainer.methods.alignx.features import Views
from trainer.methods.alignx.mixture import Mixture
from trainer.methods.alignx.plan import planned
from trainer.methods.alignx.recipe import AlignxRecipe
from trainer.methods.alignx.report import report
from trainer.methods.alignx.route import cache, head, on_test_prompts
from trainer.methods.alignx.serve import Answered, answer
from trainer.methods.alignx.stages import Stages
from trainer.pipeline import publish
from trainer.pipeline.experiment import Experiment, Opened
from trainer.pipeline.measure import measure, print_figures
from trainer.pipeline.train import refuse_what_the_engine_cannot
from trainer.planning.planned import Planned
from trainer.recipe.section import TrainerSection
from trainer.runtime.console import say, table
from trainer.training.preflight import check_settings


class Alignx:
    """The method, from the base model to adapters, head and their evidence."""

    def run(self, opened: Opened[AlignxRecipe]) -> None:
        experiment = _loaded(opened)
        recipe = experiment.recipe
        axes = axes_of(experiment)
        before = measure(experiment, "evaluate-before")
        base = measure_axes(experiment, axes, "base", [])
        stages = Stages.of(experiment, axes)
        views = Views(stages.adapters, recipe.names, recipe.features)
        base_digest = stages.adapters.base_digest()
        stages.train()
        trained, of_passes = stages.ended(recipe.names), dict(stages.rates)
        cached = cache(experiment, axes, views, trained)
        routed = head(experiment, views, cached)
        router = on_test_prompts(experiment, axes, views, routed)
        mixture = Mixture(views, routed.value, recipe.inference.mode)
        answered = cast(PreTrainedModel, mixture)
        after = measure(experiment, "evaluate-after", [routed], reads=["inference"], model=answered)
        mixed = measure_axes(experiment, axes, "mixture", [routed], model=mixture, reads=["inference"])
        audit = deliver(experiment, stages.adapters, base_digest, trained)
        compared = compare(stages, views, cached, routed) if recipe.evaluate.baselines else Compared()
        last = {name: stages.last[name] for name in recipe.names}
        evaluation = {
            "before": before.value,
            "after": after.value,
            "diagnostics": {key: audit[key] for key in publish.MOVED if key in audit},
            "alignx": {
                "axes": mixed.value["rates"],
                "baselines": {
                    "base": base.value["rates"],
                    **{name: stages.rates[step] for name, step in last.items()},
                    **compared.baselines,
                },
                "router": {**router.value, **compared.head},
                "forgetting": {
                    "after": {"base": base.value["rates"], **of_passes},
                    "lost": drops(of_passes, base.value["rates"], last, recipe.adapters.order),
                },
                "cost": costs(stages, views, routed) if recipe.evaluate.cost else {},
            },
        }
        publish.publish(experiment, evaluation, report, lambda written: _print_summary(written, recipe))

    def detect(self, opened: Opened[AlignxRecipe]) -> None:
        """Stage 1 and the head alone: up to `head.safetensors`."""
        experiment = _loaded(opened)
        axes = axes_of(experiment)
        stages = Stages.of(experiment, axes)
        views = Views(stages.adapters, experiment.recipe.names, experiment.recipe.features)
        stages.train(measured=False)
        head(experiment, views, cache(experiment, axes, views, stages.ended(experiment.recipe.names)))
        say(f"head: {opened.folder / 'head.safetensors'}")

    def export(self, opened: Opened[AlignxRecipe]) -> None:
        """Write the adapters of a run again, training what is not trained yet."""
        stages, base_digest = _trained(opened)
        deliver(stages.experiment, stages.adapters, base_digest, stages.ended(stages.experiment.recipe.names))
        say(f"adapters: {opened.folder / 'adapters'}")

    def merge(self, opened: Opened[AlignxRecipe]) -> None:
        """Write the static merge of a run's adapters as a stock checkpoint, `<run>/model`."""
        stages, _ = _trained(opened)
        static_merge(stages.experiment, stages.adapters, opened.folder / "model")

    def generate(
        self, folder: Path, prompts: Sequence[str], mode: str | None, max_new_tokens: int, batch_size: int
    ) -> list[Answered]:
        """Replies of a finished run's mixture."""
        return answer(folder, prompts, mode, max_new_tokens, batch_size)

    def planned(self, recipe: AlignxRecipe) -> Planned:
        return planned(recipe)


def _trained(opened: Opened[AlignxRecipe]) -> tuple[Stages, str]:
    experiment = _loaded(opened)
    stages = Stages.of(experiment, axes_of(experiment))
    base_digest = stages.adapters.base_digest()
    stages.train(measured=False)
    return stages, base_digest


def _loaded(opened: Opened[AlignxRecipe]) -> Experiment[AlignxRecipe]:
    sections: dict[str, TrainerSection] = {"adapters": opened.recipe.adapters}
    refuse_what_the_engine_cannot(sections)
    experiment = opened.load()
    if experiment.engine.capabilities.splits_parameters:
        allowed = ", ".join(engine_names(lambda e: not e.splits_parameters))
        raise UserError(f"method alignx: adapters are put into a whole model; allowed engines: {allowed}")
    check_settings(sections, opened.folder, experiment.model)
    return experiment


def _print_summary(evaluation: dict[str, Any], recipe: AlignxRecipe) -> None:
    found = evaluation["alignx"]
    named = {**found["baselines"], f"mixture ({recipe.inference.mode})": found["axes"]}
    rows = [
        [name, *(f"{rates[axis]['rate']:.3f}" for axis in recipe.names), f"{mean_rate(rates):.3f}"]
        for name, rates in named.items()
    ]
    table("right behaviour on held-out prompts", ["model", *recipe.names, "mean"], rows)
    router = found["router"]
    say(
        f"router on {router['n']} test prompts: accuracy {router['accuracy']:.3f}, ECE {router['ece_before']:.4f} -> "
        f"{router['ece_after']:.4f}, Brier {router['brier']:.4f}"
    )
    print_figures(recipe, {"before": evaluation["before"], "after": evaluation["after"]})


METHOD = Alignx()
