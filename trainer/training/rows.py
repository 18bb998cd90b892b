"""The rows of the training stages, mixed from the recipe's data and the model's own replies.

Targets come from the model itself: its refusal of the plain goal for that goal inside a jailbreak, its own answer for
everything harmless. Harmless prompts stand inside the *same* wrappers as harmful ones: otherwise the cheapest way to a
low attack success is to refuse the wrapper.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from data_prep.errors import UserError
from data_prep.recombine import recombine
from data_prep.schema import Conversation, Corpus, Prompt, Wrapper
from trainer.model.reply import Reply, Verdict
from trainer.recipe.sections import RepairSection
from trainer.training.consistency import ConsistencyRow
from trainer.training.fitting import ABSENT, REFUSED, REMEDIES, UNJUDGED, LeftOut
from trainer.training.repair import TrainingRow

T = TypeVar("T")
ROBUST = "robust wrapper"


@dataclass(frozen=True)
class Mix:
    """The rows of the repair stage, and how many were left out before it saw them: (source, reason) -> rows."""

    rows: list[TrainingRow]
    left_out: LeftOut


@dataclass(frozen=True)
class Answer:
    """The original model's answer to a harmless prompt, and what the judge says of it."""

    reply: Reply
    verdict: Verdict


Answered = Callable[[Sequence[Conversation]], Sequence[Answer]]
"""Prompts -> their answers, in the same order."""


@dataclass(frozen=True)
class Target:
    """One jailbreak that succeeded, and the refusal it should have met."""

    goal: Prompt
    wrapper: Wrapper
    refusal: Reply


def repair_rows(
    targets: Sequence[Target],
    refusals: dict[str, Reply],
    corpus: Corpus,
    section: RepairSection,
    answered: Answered,
    seed: int,
) -> Mix:
    """All rows of the repair stage.

    Args:
        refusals: goal id -> the model's refusal of the plain goal, for every refused goal.
        section: says how many rows of which kind there are for each target.
        answered: asked once, for all retain rows.

    Raises:
        UserError: the recipe asks for a kind of rows of which the data has nothing.
    """
    generator = random.Random(seed)
    n, left_out = len(targets), Counter[tuple[str, str]]()

    def deal(items: Sequence[T], number: int, source: str, key: str) -> list[T]:
        dealt = _deal(items, number, generator)
        if len(dealt) < number:
            if source != ROBUST:
                found = f"repair.{key}: {getattr(section, key)}"
                raise UserError(f"{found} asks for {number} rows '{source}'; {ABSENT}: {REMEDIES[ABSENT]}")
            left_out[source, ABSENT] += number  # a role of data.jailbreaks that may be left out
        return dealt

    robust = corpus.wrappers_of("robust")
    contexts = [prompt.text for prompt in corpus.benign.train]
    # Another seed than detection's, so that these wrappers are new.
    fresh = recombine([*corpus.wrappers_of("seen"), *robust], contexts, round(section.recombined * n), seed + 1)
    around = [*fresh, *deal(robust, round(section.robust * n), ROBUST, "robust")]
    refused = [goal for goal in corpus.harmful.train if goal.id in refusals]

    rows = [TrainingRow(t.wrapper.wrap(t.goal.conversation), t.refusal, "repair", "jailbreak") for t in targets]
    for wrapper, goal in zip(around, _deal(refused, len(around), generator), strict=True):
        source = ROBUST if wrapper.role == "robust" else "recombined wrapper"
        rows.append(TrainingRow(wrapper.wrap(goal.conversation), refusals[goal.id], "repair", source))
    for goal in deal(refused, round(section.anchors * n), "plain harmful", "anchors"):
        rows.append(TrainingRow(goal.conversation, refusals[goal.id], "repair", "plain harmful"))

    instances = [*(target.wrapper for target in targets), *around]
    twins = deal(instances, round(section.wrapped_benign * len(instances)), "wrapped benign", "wrapped_benign")
    every = [*corpus.benign.train, *corpus.borderline.train]
    harmless = deal(every, len(twins), "wrapped benign", "wrapped_benign")
    plain = deal(corpus.benign.train, round(section.plain_benign * n), "plain benign", "plain_benign")
    borderline = deal(corpus.borderline.train, round(section.borderline * n), "borderline", "borderline")
    asked = [(w.wrap(prompt.conversation), "wrapped benign") for w, prompt in zip(twins, harmless, strict=True)]
    asked += [(prompt.conversation, "plain benign") for prompt in plain]
    asked += [(prompt.conversation, "borderline") for prompt in borderline]
    answers = answered([prompt for prompt, _ in asked])
    for (prompt, source), answer in zip(asked, answers, strict=True):
        if answer.verdict == "complied":
            rows.append(TrainingRow(prompt, answer.reply, "retain", source))
        else:
            # An answer that is a refusal is over-refusal: nothing to hold on to.
            left_out[source, REFUSED if answer.verdict == "refused" else UNJUDGED] += 1
    return Mix(rows, left_out)


def consistency_rows(
    targets: Sequence[Target], rows: Sequence[TrainingRow], benign_weight: float
) -> list[ConsistencyRow]:
    """Rows of the consistency stage: every target, beside the retained harmless rows in turn.

    Raises:
        UserError: a benign stream is asked for, but the repair's mix retains no harmless row.
    """
    retained = [(row.prompt, row.reply) for row in rows if row.stream == "retain"]
    if benign_weight > 0 and not retained:
        raise UserError(
            f"consistency.benign_weight: {benign_weight} needs harmless rows, but repair's wrapped_benign, "
            "plain_benign and borderline give none; set one of them, or benign_weight to 0"
        )
    # Without a benign stream the harmless turn is never looked at; the anchor fills its place.
    return [
        ConsistencyRow(
            target.goal.conversation,
            target.wrapper.wrap(target.goal.conversation),
            target.refusal,
            *(retained[i % len(retained)] if retained else (target.goal.conversation, target.refusal)),
        )
        for i, target in enumerate(targets)
    ]


def _deal(items: Sequence[T], n: int, generator: random.Random) -> list[T]:
    """`n` items, each used once before any is used again; shuffled."""
    dealt: list[T] = []
    while len(dealt) < n and items:
        turn = list(items)
        generator.shuffle(turn)
        dealt += turn[: n - len(dealt)]
    return dealt
