"""Which methods there are. A method is a package with three modules, of which each is imported when it is asked for:

recipe.py   `RECIPE`: its recipe, the base's sections and its own (light: a typo answers at once)
method.py   `METHOD`: the `Method`
report.py   `sections`: what it adds to the report and the card
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Union, cast

from pydantic import Field, TypeAdapter

from data_prep.errors import UserError
from trainer.methods.method import Method, MixingMethod, Report
from trainer.recipe.errors import closest, shown
from trainer.recipe.schema import Recipe
from trainer.recipe.yaml import apply_overrides, read_yaml

METHODS = {
    "rasa": "trainer.methods.rasa",
    "steermoe": "trainer.methods.steermoe",
    "lomc": "trainer.methods.lomc",
    "alignx": "trainer.methods.alignx",
}
DEFAULT = "rasa"
"""The method of a recipe that names none."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and put `section.key=value` overrides over it.

    Raises:
        UserError: one line that names the key, what was found and what is allowed, or the file and line that is not
            YAML.
        OSError: the file cannot be read.
    """
    tree = read_yaml(path)
    return recipe_of(tree, source=str(path), overridden=apply_overrides(tree, overrides))


def recipe_of(tree: dict[str, Any], *, source: str, overridden: Sequence[tuple[str, ...]] = ()) -> Recipe:
    """The recipe in a plain dict, by the method that it names; raises as `load_recipe` does."""
    name = tree.get("method", DEFAULT)
    if not isinstance(name, str) or name not in METHODS:
        begin = "override" if ("method",) in overridden else source
        hint = closest(name, METHODS) if isinstance(name, str) else ""
        allowed = ", ".join(repr(known) for known in METHODS)
        raise UserError(f"{begin}: method: found {shown(name)}, expected one of {allowed}{hint}")
    own = recipe_class(name)
    for key in (key for key in tree if key not in own.model_fields):
        others = [other for other in METHODS if key in recipe_class(other).model_fields]
        if others:
            begin = "override" if any(at[0] == key for at in overridden) else source
            raise UserError(
                f"{begin}: {key}: a section of method {', '.join(others)}, and this recipe's method is {name}; "
                f"allowed: {', '.join(own.model_fields)}"
            )
    return own.of({**tree, "method": name}, source=source, overridden=overridden)


def recipe_class(name: str) -> type[Recipe]:
    """The recipe of a method."""
    return cast(type[Recipe], import_module(f"{METHODS[name]}.recipe").RECIPE)


def recipe_schema() -> dict[str, Any]:
    """JSON schema of every recipe: a union discriminated by `method`."""
    members = tuple(recipe_class(name) for name in METHODS)
    union = Annotated[Union[members], Field(discriminator="method")] if len(members) > 1 else members[0]  # noqa: UP007
    schema: dict[str, Any] = TypeAdapter(union).json_schema()  # type: ignore[arg-type]
    return schema


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe follows."""
    return _method_named(recipe.method)


def _method_named(name: str) -> Method:
    return cast(Method, import_module(f"{METHODS[name]}.method").METHOD)


def refuse_adapters(name: str, run: Path) -> None:
    """`UserError` for a run whose result is no checkpoint and no patch, which are what is pushed."""
    if name in METHODS and isinstance(_method_named(name), MixingMethod):
        raise UserError(
            f"{run}: a run of method {name} has adapters and no model of its own; push takes a model or patch"
        )


def report_of(name: str) -> Report | None:
    """What a method adds to the report and the card; None for a name that this release does not know."""
    if name not in METHODS:
        return None
    return cast(Report, import_module(f"{METHODS[name]}.report").report)
