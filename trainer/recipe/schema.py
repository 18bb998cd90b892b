"""The recipe: one YAML file is one whole run.

Every key is typed, has a default where one makes sense, and can be overridden as `section.key=value`. Relative paths
inside a recipe (a model folder, a data file, `run.output_dir`) are taken from the current directory, not from the
recipe's own folder: recipes are run from the root of a checkout.

A recipe is that of one method: `methods/<name>/recipe.py` adds the method's own sections to those of `Recipe`, and
`methods/table.py` reads a file as the recipe of the method that it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from data_prep.config import DataConfig
from data_prep.errors import UserError
from trainer.recipe.errors import at_key, one_line
from trainer.recipe.section import WITHOUT_LIBRARIES, Section, files_named
from trainer.recipe.sections import EvaluateSection, ModelSection, RunSection
from trainer.recipe.yaml import dump_yaml

R = TypeVar("R", bound="Recipe")


class Recipe(Section):
    """What every run has; constructing one checks it as strictly as reading it from a file.

    `needed_data`: the parts of `data` that the method cannot do without. `takes_dense`: it works on a model without
    experts, too.
    """

    needed_data: ClassVar[tuple[str, ...]] = ()
    takes_dense: ClassVar[bool] = False

    method: str = Field(description="the method that the run follows")
    run: RunSection
    model: ModelSection
    data: DataConfig
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)

    @model_validator(mode="before")
    @classmethod
    def _empty_section_is_left_out(cls, tree: Any) -> Any:
        # `repair:` with every key commented out reads as null.
        return {key: value for key, value in tree.items() if value is not None} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _has_needed_data(self) -> Recipe:
        for name in self.needed_data:
            if getattr(self.data, name) is None:
                what = type(self.data).model_fields[name].description
                if name in self.data.model_fields_set:
                    raise at_key(f"data.{name}", f"found null, expected a mapping of keys: {what}")
                raise at_key(f"data.{name}", f"missing, and method {self.method} needs it; expected {what}")
        return self

    @classmethod
    def of(cls: type[R], tree: dict[str, Any], *, source: str, overridden: Sequence[tuple[str, ...]] = ()) -> R:
        """Check a plain dict; `source` begins the line of an error, except for keys in `overridden`.

        Raises:
            UserError: one line that names the key, what was found and what is allowed.
        """
        try:
            cls.model_validate(tree, context=WITHOUT_LIBRARIES)  # a slip answers before TRL is imported
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(one_line(error, cls, source, overridden)) from error

    @property
    def folder(self) -> Path:
        """The run folder, `<output_dir>/<name>`."""
        return Path(self.run.output_dir) / self.run.name

    def tree(self) -> dict[str, Any]:
        """Every section with every key as plain JSON values, defaults filled in, trainer arguments flat."""
        return self.model_dump(mode="json")

    def resolved_yaml(self) -> str:
        """The recipe with every default filled in; loads to an equal recipe."""
        return dump_yaml(self.tree())

    def hash(self, *sections: str) -> str:
        """Hex sha256 over the canonical JSON of these sections or keys (`"data"`, `"run.seed"`); of all by default.

        `KeyError` for a name that the recipe does not have.
        """
        tree = self.tree()
        chosen = {name: _at(tree, name) for name in sections} if sections else tree
        return tree_hash(chosen)

    def files(self, *sections: str) -> Iterator[str]:
        """What the keys of these sections name that are marked as files (`NamesFile`): paths, or Hub ids."""
        for name in dict.fromkeys(section.split(".")[0] for section in sections):
            section = getattr(self, name)
            for part in section if isinstance(section, list) else [section]:
                if isinstance(part, BaseModel):
                    yield from files_named(part)


def tree_hash(tree: dict[str, Any]) -> str:
    """Hex sha256 over the canonical JSON of a recipe as plain values, or of a part of one."""
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _at(tree: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree
