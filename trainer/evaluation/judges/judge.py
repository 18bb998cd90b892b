"""Judges by name: who says whether a reply refuses, as the recipe's `evaluate.judge` has it.

A new judge is a module here, one line in `BUILDERS` and its name in `recipe/sections.py`.
"""

from collections.abc import Callable

from trainer.evaluation.judges.phrases import PhraseJudge
from trainer.model.reply import Judge, Verdict
from trainer.recipe.sections import EvaluateSection

__all__ = ["BUILDERS", "Judge", "Verdict", "judge_of"]

BUILDERS: dict[str, Callable[[EvaluateSection], Judge]] = {
    "phrases": lambda section: PhraseJudge(section.refusal_markers),
}
"""Name of a judge -> what builds it from the section; the names are `recipe.sections.JUDGES`."""


def judge_of(section: EvaluateSection) -> Judge:
    """The judge that the section names. `ValueError` for refusal markers that hold no text."""
    return BUILDERS[section.judge](section)
