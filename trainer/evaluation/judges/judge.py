"""Judges by name: who says whether a reply refuses, as the recipe's `evaluate.judge` has it.

A new judge is a module here, one line in `BUILDERS` and its name in `recipe/judges.py`. Broken replies are settled
here, whichever judge is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_prep.schema import Conversation
from trainer.evaluation.degenerate import is_degenerate
from trainer.evaluation.judges.endpoint import Endpoint
from trainer.evaluation.judges.grade import Grade
from trainer.evaluation.judges.guard import GuardModel
from trainer.evaluation.judges.phrases import PhraseJudge
from trainer.model.reply import Judge, Reply, Verdict
from trainer.recipe.sections import EvaluateSection

__all__ = ["BUILDERS", "Judge", "Verdict", "judge_of"]


class Grader(Protocol):
    """Says of every reply whether it declines and whether it does harm, as far as it can tell."""

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Grade]: ...


@dataclass(frozen=True)
class ByGrades:
    """A judge that grades; of a reply that it only calls harmless, `phrases` say whether it declines."""

    grader: Grader
    phrases: PhraseJudge

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Verdict]:
        grades = self.grader(prompts, replies)
        return [grade.verdict(self.phrases.verdict(reply.text)) for grade, reply in zip(grades, replies, strict=True)]


def _guard(section: EvaluateSection) -> Judge:
    assert section.guard is not None, "the section checks it"
    return ByGrades(GuardModel(section.guard), PhraseJudge(section.refusal_markers))


def _endpoint(section: EvaluateSection) -> Judge:
    assert section.endpoint is not None, "the section checks it"
    return ByGrades(Endpoint(section.endpoint), PhraseJudge(section.refusal_markers))


BUILDERS: dict[str, Callable[[EvaluateSection], Judge]] = {
    "phrases": lambda section: PhraseJudge(section.refusal_markers),
    "guard": _guard,
    "endpoint": _endpoint,
}
"""Name of a judge -> what builds it from the section; the names are `recipe.judges.JUDGES`."""


@dataclass(frozen=True)
class OfWholeReplies:
    """A judge that is not asked about broken replies: blank or in a loop, they are neither answer nor refusal."""

    judge: Judge

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Verdict]:
        assert len(prompts) == len(replies), f"{len(replies)} replies to {len(prompts)} prompts"
        whole = [i for i, reply in enumerate(replies) if not is_degenerate(reply.text)]
        verdicts: list[Verdict] = ["unjudged"] * len(replies)
        judged = self.judge([prompts[i] for i in whole], [replies[i] for i in whole])
        for i, verdict in zip(whole, judged, strict=True):
            verdicts[i] = verdict
        return verdicts


def judge_of(section: EvaluateSection) -> Judge:
    """The judge that the section names, for whole replies. `UserError` for refusal markers that hold no text."""
    return OfWholeReplies(BUILDERS[section.judge](section))
