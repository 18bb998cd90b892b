"""Texts that stand where they must not: twice, in training and test, as harmful and as harmless.

Conversations are compared whole, as `same_text` says.
"""

from collections.abc import Sequence

from .errors import UserError
from .near import Goals
from .same_text import compared
from .schema import Prompt, Wrapper
from .sources import Part
from .usable import NO_TEXT

TWICE_TRAINED = "training rows twice"
TWICE_TESTED = "test rows twice"
NEAR_A_GOAL = "training rows near a test goal"


def count_once(part: Part) -> None:
    """Keep the first of rows with one text, in training and in test: `n` is the number of distinct prompts."""
    part.train = _first_of_each(part, part.train, TWICE_TRAINED)
    part.test = _first_of_each(part, part.test, TWICE_TESTED)


def refuse_both_sides(harmful: Part, harmless: Part) -> None:
    """Raise `UserError` where a text is to be refused and to be answered; names both keys and the first rows."""
    goals = {compared(prompt.conversation): prompt.id for prompt in [*harmful.train, *harmful.test]}
    shared = [p for p in [*harmless.train, *harmless.test] if compared(p.conversation) in goals]
    if shared:
        first = shared[0]
        raise UserError(
            f"{harmful.key} and {harmless.key} share {len(shared)} texts, first {goals[compared(first.conversation)]} "
            f"and {first.id}; a text is either to be refused or to be answered"
        )


def keep_tests_unseen(parts: list[Part]) -> None:
    """Drop every training row whose text is in a test part, its own or another source's.

    Raises `UserError` where nothing of a source's training rows is left.
    """
    for part in parts:
        asked = len(part.train)
        for tested in [part, *(other for other in parts if other is not part)]:
            texts = {compared(prompt.conversation) for prompt in tested.test}
            kept = [prompt for prompt in part.train if compared(prompt.conversation) not in texts]
            if dropped := len(part.train) - len(kept):
                part.dropped[_leak(part, tested)] += dropped
                part.train = kept
        if asked and not part.train:
            raise UserError(f"{part.key}: every one of the {asked} training rows is also in test")


def keep_goals_unseen(harmful: Part, parts: list[Part], near: float) -> None:
    """Drop every training row that is nearly one of the harmful test goals, or holds one, whatever its source.

    `near`: Jaccard index of content words, see `near.Goals`. Every turn is looked at, so that a goal inside a
    jailbreak or in the middle of a conversation is found. Raises `UserError` where nothing of a source's training rows
    is left.
    """
    goals = Goals((prompt.text for prompt in harmful.test), near)
    for part in parts:
        asked = len(part.train)
        kept = [p for p in part.train if not any(goals.is_near(turn.text) for turn in p.conversation.turns)]
        if asked and not kept:
            raise UserError(
                f"{part.key}: every one of the {asked} training rows is near a test goal of {harmful.key} (content "
                f"words in common: {near:g} or more); allowed: other rows, or data.near_duplicates: null"
            )
        part.dropped[NEAR_A_GOAL] += asked - len(kept)
        part.train = kept


def near_templates(wrappers: Sequence[Wrapper], near: float) -> list[str]:
    """A line where templates that are only measured resemble trained ones, goal aside: their figures are flattered."""

    def bare(wrapper: Wrapper) -> str:
        texts = [*(turn.text for turn in wrapper.before), wrapper.text]
        return " ".join(texts).replace(wrapper.placeholder, " ")

    trained = Goals((bare(wrapper) for wrapper in wrappers if wrapper.role == "seen"), near)
    close = [wrapper.id for wrapper in wrappers if wrapper.role == "unseen" and trained.is_near(bare(wrapper))]
    if not close:
        return []
    return [f"data.jailbreaks: {len(close)} unseen templates are near a seen one, first {close[0]}"]


def notes(part: Part) -> list[str]:
    """One line for every reason for which rows were dropped that the recipe asked for."""
    lines = {
        NO_TEXT: "{} rows without text left out",
        TWICE_TRAINED: "{} training rows dropped, their text is that of another training row",
        TWICE_TESTED: "{} test rows dropped, their text is that of another test row",
        NEAR_A_GOAL: "{} training rows dropped, they are near a harmful goal of the test part",
        _leak(part, part): "{} training rows dropped, their text is also in test",
    }
    said = []
    for reason, n in part.dropped.items():
        line = lines.get(reason)
        if line is None and reason.startswith(_LEAK):
            line = "{} training rows dropped, their text is also in the test part of " + reason.removeprefix(_LEAK)
        if n and line:
            said.append(f"{part.key}: {line.format(n)}")
    return said


_LEAK = "training rows in the test of "


def _leak(part: Part, tested: Part) -> str:
    return "training rows in the test" if tested is part else _LEAK + tested.key


def _first_of_each(part: Part, prompts: list[Prompt], reason: str) -> list[Prompt]:
    first = {compared(prompt.conversation): prompt for prompt in reversed(prompts)}
    kept = [prompt for prompt in prompts if first[compared(prompt.conversation)] is prompt]
    part.dropped[reason] += len(prompts) - len(kept)
    return kept
