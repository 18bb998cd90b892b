"""The names of a trainer's arguments as read from its source are those of the class."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

from trainer.recipe.argument_names import NOT_TAKEN, argument_names


@pytest.mark.parametrize("cls", [TrainingArguments, SFTConfig])
def test_names_read_from_the_source_are_those_that_the_constructor_takes(cls: type) -> None:
    taken = {field.name for field in dataclasses.fields(cls) if field.init} - NOT_TAKEN
    assert argument_names(cls.__name__) == taken
