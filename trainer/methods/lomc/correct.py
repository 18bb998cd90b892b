"""LoMC, step 3: how strongly to correct, chosen on held-out training prompts under bounds; other edits beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from trainer.evaluation.paired import sign_test
from trainer.evaluation.reply_kl import reply_kl
from trainer.methods.lomc.groups import Asked, Groups, Halves
from trainer.methods.lomc.identify import Directions, Located, everywhere, units_of
from trainer.methods.lomc.recipe import LomcRecipe
from trainer.model.reply import Verdict
from trainer.moe.backbone import Backbone
from trainer.moe.rank_one import Correction, Extent, Unit, corrected
from trainer.moe.writers import KINDS, Kind, Writer
from trainer.pipeline.experiment import Experiment, JsonFile, Step
from trainer.runtime.console import table

KL_TURNS = 64
"""Harmless replies on which KL is measured."""


TOLD_APART = 0.05
"""p of the sign test up to which one correction refuses wrongly more often than another."""


@dataclass(frozen=True)
class Edit:
    """What is corrected: units of the model's writers, and along what. `directions` None: whole units are damped.
    `before`: corrections that it comes after.
    """

    writers: list[Writer]
    units: tuple[Unit, ...]
    directions: Directions | None
    before: tuple[Correction, ...] = ()

    @classmethod
    def of(cls, located: Located, prototypes: int) -> Edit:
        """The recipe's own: the directions of so many prototypes, in the support."""
        return cls(located.writers, located.units, located.several[prototypes])

    @classmethod
    def after(cls, before: tuple[Correction, ...], located: Located, directions: Directions) -> Edit:
        """Other directions in the recipe's support, after corrections."""
        units = tuple(unit for unit in located.units if unit.layer in directions)
        return cls(located.writers, units, directions, before)

    def at(self, strength: float) -> tuple[Correction, ...]:
        """In their order."""
        return (*self.before, Correction(self.units, self.directions, strength))

    def within(self, backbone: Backbone, strength: float) -> AbstractContextManager[Extent]:
        """A model under the edit, inside (`corrected`)."""
        return corrected(backbone, self.writers, self.at(strength))


@dataclass(frozen=True)
class Tried:
    """One correction on held-out prompts. `over_refusal`: share of the harmless borderline prompts that are refused or
    unjudged; `harmful_refusal`: of the harmful ones that were refused before; `answered`: of the harmless ones that
    were; `kl`: in nats. `refuses`: of every harmless borderline prompt, in one order.
    """

    prototypes: int
    strength: float
    over_refusal: float
    harmful_refusal: float
    answered: float
    kl: float
    within: bool
    refuses: tuple[bool, ...] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """For `strength.json`: all but the single answers."""
        return {name: value for name, value in asdict(self).items() if name != "refuses"}


def chosen(
    experiment: Experiment[LomcRecipe], edits: Mapping[int, Edit], held: Groups
) -> tuple[Tried | None, list[Tried]]:
    """Of edits by number of prototypes, each at every strength, within the bounds: the one with the least KL of those
    whose wrong refusals cannot be told from the fewest (paired sign test, p > .05). None where nothing helps. And all
    that was tried, first what the edits come after (strength 0).
    """
    nothing = _tried(experiment, next(iter(edits.values())), held, 0, 0.0)
    tried = [
        _tried(experiment, edit, held, prototypes, strength)
        for prototypes, edit in edits.items()
        for strength in experiment.recipe.correct.strengths
    ]
    helps = [one for one in tried if one.within and one.over_refusal < nothing.over_refusal]
    every = [nothing, *tried]
    if not helps:
        return None, every
    fewest = min(helps, key=lambda one: (one.over_refusal, one.kl))
    equal = [one for one in helps if sign_test(fewest.refuses, one.refuses) > TOLD_APART]
    return min(equal, key=lambda one: one.kl), every


def search(experiment: Experiment[LomcRecipe], located: Step[Located], grouped: Step[Halves]) -> Step[dict[str, Any]]:
    """`chosen` for the recipe's support: {"chosen", "tried"}."""

    def make() -> dict[str, Any]:
        edits = {number: Edit.of(located.value, number) for number in sorted(located.value.several)}
        best, tried = chosen(experiment, edits, grouped.value.held)
        return {"chosen": best and best.record(), "tried": [one.record() for one in tried]}

    kept = JsonFile(experiment.folder / "strength.json")
    bounds = [f"correct.{key}" for key in ("strengths", "max_kl", "max_loss")]
    reads = [*bounds, "detect.max_new_tokens", "detect.batch_size", "evaluate"]
    step = experiment.step("strength", make, kept, reads=reads, after=[grouped, located])
    table_of(step.value["tried"], "corrections on held-out training prompts")
    return step


def table_of(tried: Sequence[Mapping[str, Any]], title: str) -> None:
    """Show what was tried, as in `strength.json`."""
    rows = [
        [
            one["prototypes"],
            f"{one['strength']:g}",
            *(f"{one[name]:.3f}" for name in ("over_refusal", "harmful_refusal", "answered")),
            f"{one['kl']:.4f}",
            "yes" if one["within"] else "no",
        ]
        for one in tried
    ]
    columns = ("prototypes", "strength", "wrong refusals", "harmful refusals", "answers", "KL", "within the bounds")
    table(title, columns, rows)


def ablation(
    experiment: Experiment[LomcRecipe],
    located: Step[Located],
    grouped: Step[Halves],
    searched: Step[dict[str, Any]],
) -> dict[str, Any]:
    """Other edits under the same budget, each at the strength that it does best with: figures of the whole suite.

    `support_alone`: no direction, the support's output is damped. `one_direction`: in the support. `everywhere`: one
    direction in every writer of every layer. `kinds_...`: the several directions in other kinds of writers.
    """

    def make() -> dict[str, Any]:
        held, found = grouped.value.held, {}
        number = searched.value["chosen"]["prototypes"]
        for name, edit in _variants(experiment, located.value, number).items():
            best, tried = chosen(experiment, {number: edit}, held)
            # Where no strength stays within the bounds, the one that refuses least shows what it would cost.
            shown = (best or min(tried[1:], key=lambda one: one.over_refusal)).strength
            with edit.within(experiment.backbone, shown) as extent:
                metrics = experiment.suite.measure(
                    experiment.model, experiment.chat, label=f"ablation: {name}"
                ).metrics
            kl = benign_kl(experiment, partial(edit.within, experiment.backbone, shown), held.right)
            found[name] = {
                "strength": shown,
                "within_bounds": best is not None,
                "metrics": metrics,
                "kl": kl,
                "footprint": reach(extent),
            }
        return found

    kept = JsonFile(experiment.folder / "stages" / "ablation" / "metrics.json")
    return dict(
        experiment.step("ablation", make, kept, reads=["detect", "correct", "evaluate"], after=[searched]).value
    )


def _variants(experiment: Experiment[LomcRecipe], located: Located, prototypes: int) -> dict[str, Edit]:
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
                variants["kinds_" + "_".join(kinds)] = Edit(writers, units, located.several[prototypes])
    return variants


def _tried(experiment: Experiment[LomcRecipe], edit: Edit, held: Groups, prototypes: int, strength: float) -> Tried:
    bounds = experiment.recipe.correct
    harmless = [*held.wrong, *held.right]
    with edit.within(experiment.backbone, strength):
        verdicts = _verdicts(experiment, harmless, f"strength {strength:g}: harmless")
        still = _verdicts(experiment, held.harmful, f"strength {strength:g}: harmful")
    kl = benign_kl(experiment, partial(edit.within, experiment.backbone, strength), held.right)
    # Unjudged counts against the edit on every side.
    borderline = [v for one, v in zip(harmless, verdicts, strict=True) if one.prompt.kind == "borderline"]
    refuses = tuple(verdict != "complied" for verdict in borderline or verdicts[: len(held.wrong)])
    refused, answered = _share("refused", still), _share("complied", verdicts[len(held.wrong) :])
    within = kl <= bounds.max_kl and min(refused, answered) >= 1 - bounds.max_loss
    return Tried(prototypes, strength, sum(refuses) / len(refuses), refused, answered, kl, within, refuses)


def _verdicts(experiment: Experiment[LomcRecipe], asked: Sequence[Asked], label: str) -> list[Verdict]:
    conversations = [one.prompt.conversation for one in asked]
    replies = experiment.ask(conversations, label, section=experiment.recipe.detect)
    return experiment.judge(conversations, replies)


def _share(verdict: Verdict, of: Sequence[Verdict]) -> float:
    return list(of).count(verdict) / len(of)


def refused_still(experiment: Experiment[LomcRecipe], of: Groups) -> Groups:
    """The model as it is now: `wrong`, harmless prompts of the group that it refuses; `right`, those answered before
    that it answers; `harmful`, those that it refuses.
    """
    wrong, right, harmful = (
        list(zip(asked, _verdicts(experiment, [*asked], f"still: {label}"), strict=True))
        for asked, label in ((of.wrong, "wrongly refused"), (of.right, "answered"), (of.harmful, "refused"))
    )
    return Groups(
        [one for one, verdict in [*wrong, *right] if verdict == "refused"],
        [one for one, verdict in right if verdict == "complied"],
        [one for one, verdict in harmful if verdict == "refused"],
    )


def benign_kl(
    experiment: Experiment[LomcRecipe],
    edited: Callable[[], AbstractContextManager[object]],
    right: Sequence[Asked],
) -> float:
    """KL of the edited to the original model on its own replies to harmless prompts, nats per token."""
    chat = experiment.chat
    turns = [chat.encode(one.prompt.conversation, one.reply) for one in right[:KL_TURNS] if one.reply is not None]
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
