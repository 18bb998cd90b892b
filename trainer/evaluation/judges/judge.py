"""Judges by name: who says whether a reply refuses, as the recipe's `evaluate.judge` has it.

A new judge is a module here, one line in `BUILDERS` and its name in `recipe/sections.py`. Broken replies are settled
here, whichever judge is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.schema import Conversation
from trainer.evaluation.degenerate import is_degenerate
from trainer.evaluation.judges.phrases import PhraseJudge
from trainer.model.reply import Judge, Reply, Verdict
from trainer.recipe.sections import EvaluateSection

__all__ = ["BUILDERS", "Judge", "Verdict", "judge_of"]

BUILDERS: dict[str, Callable[[EvaluateSection], Judge]] = {
    "phrases": lambda section: PhraseJudge(section.refusal_markers),
}
"""Name of a judge -> what builds it from the section; the names are `recipe.sections.JUDGES`."""


@dataclass(frozen=True)
class OfWholeReplies:
    """A judge that is not asked about broken replies: blank or in a loop, they are neither answer nor refusal."""

    judge: Judge

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Verdict]:
        verdicts = self.judge(prompts, replies)
        return [
            "unjudged" if is_degenerate(reply.text) else verdict
            for reply, verdict in zip(replies, verdicts, strict=True)
        ]


def judge_of(section: EvaluateSection) -> Judge:
    """The judge that the section names, for whole replies. `UserError` for refusal markers that hold no text."""
    return OfWholeReplies(BUILDERS[section.judge](section))
