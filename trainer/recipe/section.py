"""What every section of a recipe has in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from data_prep.config import NamesFile
from trainer.recipe.trainer_arguments import check_argument_names, check_argument_values

# The largest values are far beyond use, and far below what exhausts memory or never ends.
Count = Annotated[int, Field(ge=1, le=65536)]
Share = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
PerPair = Annotated[float, Field(ge=0, le=100)]
"""Rows of a kind for every pair."""

WITHOUT_LIBRARIES = {"without": "libraries"}
"""Context of a validation that answers at once: all but the values of the trainer's arguments."""


class Section(BaseModel):
    """A part of the recipe. Values are not coerced: YAML already has types, and `"8"` for 8 is most often a slip."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


class TrainerSection(Section):
    """A section that also takes any field of a trainer's arguments class, flat beside its own keys.

    `trainer_defaults`: what the stage sets where the recipe does not, and the arguments class would set otherwise.
    """

    model_config = ConfigDict(extra="allow")
    arguments_class: ClassVar[str]
    trainer_defaults: ClassVar[dict[str, Any]] = {}

    @property
    def given_arguments(self) -> dict[str, Any]:
        """The arguments of the trainer that the recipe gives."""
        return dict(self.model_extra or {})

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The arguments of the trainer: the recipe's, over the stage's own defaults."""
        return {**self.trainer_defaults, **self.given_arguments}

    @model_validator(mode="after")
    def _known_to_the_trainer(self, info: ValidationInfo) -> TrainerSection:
        given = self.given_arguments
        check_argument_names(self.arguments_class, list(given), own=list(type(self).model_fields))
        if info.context is not WITHOUT_LIBRARIES:
            check_argument_values(self.arguments_class, given)
        return self


def files_named(section: BaseModel) -> Iterator[str]:
    """The values of every key that is marked as naming a file or folder (`NamesFile`), section by section."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, BaseModel):
                yield from files_named(part)
            elif isinstance(part, str) and any(isinstance(mark, NamesFile) for mark in _marks(field)):
                yield part


def _marks(field: Any) -> list[Any]:
    """Metadata of a field and of the members of its union (`FileName | None`)."""
    found = list(field.metadata)
    for member in getattr(field.annotation, "__args__", ()):
        found += getattr(member, "__metadata__", ())
    return found
