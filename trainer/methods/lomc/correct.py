"""LoMC, step 3: how strongly to correct, chosen on held-out training prompts under bounds; other edits beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from trainer.evaluation.reply_kl import reply_kl
from trainer.methods.lomc.groups import Asked, Groups, Halves
from trainer.methods.lomc.identify import Directions, Located, everywhere, units_of
from trainer.methods.lomc.recipe import LomcRecipe
from trainer.moe.backbone import Backbone
from trainer.moe.rank_one import Correction, Extent, Unit, corrected
from trainer.moe.writers import KINDS, Kind, Writer
from trainer.pipeline.experiment import Experiment, JsonFile, Step
from trainer.runtime.console import say

KL_TURNS = 64
"""Harmless replies on which KL is measured."""


@dataclass(frozen=True)
class Edit:
    """What is corrected: units of the model's writers, and along what. `directions` None: whole units are damped."""

    writers: list[Writer]
    units: tuple[Unit, ...]
    directions: Directions | None

    @classmethod
    def of(cls, located: Located) -> Edit:
        """The recipe's own: the several directions in the support."""
        return cls(located.writers, located.units, located.several)

    def at(self, strength: float) -> Correction:
        return Correction(self.units, self.directions, strength)

    def within(self, backbone: Backbone, strength: float) -> AbstractContextManager[Extent]:
        """A model under the edit, inside (`corrected`)."""
        return corrected(backbone, self.writers, [self.at(strength)])


@dataclass(frozen=True)
class Tried:
    """One strength on held-out prompts. `over_refusal`: share of the harmless borderline prompts that are refused or
    unjudged; `harmful_refusal`: of the harmful ones that were refused before; `kl`: in nats.
    """

    strength: float
    over_refusal: float
    harmful_refusal: float
    kl: float
    within: bool


def chosen(experiment: Experiment[LomcRecipe], edit: Edit, held: Groups) -> tuple[float | None, list[Tried]]:
    """The strength with the fewest wrong refusals within the bounds, the weakest of equals; None where none helps."""
    tried = [_tried(experiment, edit, held, strength) for strength in (0.0, *experiment.recipe.correct.strengths)]
    nothing, *others = tried
    within = [one for one in others if one.within and one.over_refusal < nothing.over_refusal]
    best = min(within, key=lambda one: (one.over_refusal, one.strength), default=None)
    return (None if best is None else best.strength), tried


def search(experiment: Experiment[LomcRecipe], located: Step[Located], grouped: Step[Halves]) -> Step[dict[str, Any]]:
    """`chosen` for the recipe's support: {"strength", "tried"}."""

    def make() -> dict[str, Any]:
        strength, tried = chosen(experiment, Edit.of(located.value), grouped.value.held)
        return {"strength": strength, "tried": [asdict(one) for one in tried]}

    kept = JsonFile(experiment.folder / "strength.json")
    reads = ["correct", "detect.max_new_tokens", "detect.batch_size", "evaluate"]
    step = experiment.step("strength", make, kept, reads=reads, after=[grouped, located])
    for one in step.value["tried"]:
        bounds = "" if one["within"] else ", beyond the bounds"
        say(
            f"strength {one['strength']:g}: wrong refusals {one['over_refusal']:.3f}, harmful refusals "
            f"{one['harmful_refusal']:.3f}, KL {one['kl']:.4f}{bounds}"
        )
    return step


def ablation(
    experiment: Experiment[LomcRecipe], located: Step[Located], grouped: Step[Halves], after: Sequence[Step[Any]]
) -> dict[str, Any]:
    """Other edits under the same budget, each at the strength that it does best with: figures of the whole suite.

    `support_alone`: no direction, the support's output is damped. `one_direction`: in the support. `everywhere`: one
    direction in every writer of every layer. `kinds_...`: the several directions in other kinds of writers.
    """

    def make() -> dict[str, Any]:
        held, found = grouped.value.held, {}
        for name, edit in _variants(experiment, located.value).items():
            strength, tried = chosen(experiment, edit, held)
            # Where no strength stays within the bounds, the one that refuses least shows what it would cost.
            shown = strength if strength is not None else min(tried[1:], key=lambda one: one.over_refusal).strength
            with edit.within(experiment.backbone, shown) as extent:
                metrics = experiment.suite.measure(
                    experiment.model, experiment.chat, label=f"ablation: {name}"
                ).metrics
            kl = benign_kl(experiment, edit, shown, held.right)
            found[name] = {
                "strength": shown,
                "within_bounds": strength is not None,
                "metrics": metrics,
                "kl": kl,
                "footprint": reach(extent),
            }
        return found

    kept = JsonFile(experiment.folder / "stages" / "ablation" / "metrics.json")
    return dict(experiment.step("ablation", make, kept, reads=["detect", "correct", "evaluate"], after=after).value)


def _variants(experiment: Experiment[LomcRecipe], located: Located) -> dict[str, Edit]:
    writers, plain = located.writers, located.plain
    variants = {
        "support_alone": Edit(writers, located.units, None),
        "one_direction": Edit(writers, tuple(unit for unit in located.units if unit.layer in plain), plain),
        "everywhere": Edit(writers, everywhere(writers, experiment.backbone, plain), plain),
    }
    present = [kind for kind in KINDS if any(writer.kind == kind for writer in writers)]
    combinations: list[list[Kind]] = [[kind] for kind in present] + ([present] if len(present) > 1 else [])
    for kinds in combinations:
        if set(kinds) != set(experiment.recipe.detect.kinds):
            units = units_of(experiment, located, kinds)
            if units:
                variants["kinds_" + "_".join(kinds)] = Edit(writers, units, located.several)
    return variants


def _tried(experiment: Experiment[LomcRecipe], edit: Edit, held: Groups, strength: float) -> Tried:
    recipe = experiment.recipe
    borderline = [one for one in (*held.wrong, *held.right) if one.prompt.kind == "borderline"] or held.wrong
    with edit.within(experiment.backbone, strength):
        over = _refused(experiment, borderline, f"strength {strength:g}: harmless")
        harmful = _refused(experiment, held.harmful, f"strength {strength:g}: harmful")
    kl = benign_kl(experiment, edit, strength, held.right)
    within = kl <= recipe.correct.max_kl and harmful[0] >= 1 - recipe.correct.max_loss
    # Unjudged counts against the edit on either side.
    return Tried(strength, over[0] + over[1], harmful[0], kl, within)


def _refused(experiment: Experiment[LomcRecipe], asked: Sequence[Asked], label: str) -> tuple[float, float]:
    """Shares of the prompts that are refused, and unjudged."""
    conversations = [one.prompt.conversation for one in asked]
    replies = experiment.ask(conversations, label, section=experiment.recipe.detect)
    verdicts = experiment.judge(conversations, replies)
    return verdicts.count("refused") / len(verdicts), verdicts.count("unjudged") / len(verdicts)


def benign_kl(experiment: Experiment[LomcRecipe], edit: Edit, strength: float, right: Sequence[Asked]) -> float:
    """KL of the edited to the original model on its own replies to harmless prompts, nats per token."""
    chat = experiment.chat
    turns = [chat.encode(one.prompt.conversation, one.reply) for one in right[:KL_TURNS] if one.reply is not None]
    edited = partial(edit.within, experiment.backbone, strength)
    return reply_kl(experiment.backbone, chat, turns, edited, experiment.recipe.detect.batch_size)


def reach(extent: Extent) -> dict[str, Any]:
    """The footprint of an edit, for `evaluation.json`."""
    return {
        "units": extent.units,
        "experts": extent.experts,
        "layers": extent.layers,
        "parameters": extent.parameters,
        "of_parameters": extent.of_parameters,
        "relative_change": extent.relative,
        "unchanged": [list(unit) for unit in extent.unchanged],
    }
