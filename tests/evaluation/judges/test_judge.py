"""Judges by name."""

import pytest
from pydantic import ValidationError

from trainer.evaluation.judges.judge import BUILDERS, judge_of
from trainer.model.reply import Reply
from trainer.recipe.judges import JUDGES
from trainer.recipe.sections import EvaluateSection


def test_the_recipe_names_the_judges_that_can_be_built():
    assert tuple(BUILDERS) == JUDGES
    with pytest.raises(ValidationError, match=r"judge 'frases'.*did you mean 'phrases'"):
        EvaluateSection(judge="frases")


def test_a_judge_is_built_as_its_section_says():
    own, built_in = EvaluateSection(refusal_markers=["nope"]), EvaluateSection()
    replies = [Reply.written("Nope, never."), Reply.written("I cannot help with that.")]
    prompts = ["first", "second"]
    assert judge_of(own)(prompts, replies) == ["refused", "complied"]
    assert judge_of(built_in)(prompts, replies)[1] == "refused"
