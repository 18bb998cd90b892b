"""From pydantic's list of errors to one line: the key, what was found, what is allowed."""

import difflib
import json
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

# What pydantic says of these repeats the pattern or the length, not what is meant.
_BETTER_DESCRIBED = ("string_pattern_mismatch", "string_too_short", "string_too_long", "too_short")


def closest(found: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed name, or an empty string where none is near."""
    near = difflib.get_close_matches(found, list(allowed), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def at_key(key: str, message: str) -> PydanticCustomError:
    """An error of a section's validator about one of its keys: pydantic knows only the section it arose in."""
    return PydanticCustomError("at_key", "{message}", {"key": key, "message": message})


def one_line(
    error: ValidationError, model: type[BaseModel], source: str, overridden: Sequence[tuple[str, ...]] = ()
) -> str:
    """The first error of a model as one line. It begins with `source`, or with `override` where the key is overridden.

    Unknown keys go first: a missing key is often the same slip seen from the other side.
    """
    errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    first = errors[0]
    key = _key(model, first)
    same = [item for item in errors if _key(model, item) == key]
    others = len({_key(model, item) for item in errors}) - 1
    begin = "override" if any(all(a == b for a, b in zip(key, o, strict=False)) for o in overridden) else source
    named = f"{begin}: {'.'.join(key)}: " if key else f"{begin}: "
    more = f" (and {others} more)" if others else ""
    return named + _problem(model, key, same) + more


def _problem(model: type[BaseModel], key: tuple[str, ...], errors: list[ErrorDetails]) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        allowed = list(dict.fromkeys(name for owner in _models(model, key[:-1]) for name in owner.model_fields))
        return f"unknown key{closest(key[-1], allowed)}" + (f"; allowed: {', '.join(allowed)}" if allowed else "")
    if first["type"] == "missing":
        what = _description(model, key)
        return "missing, and it has no default" + (f"; expected {what}" if what else "")
    if first["type"] == "at_key":
        return first["msg"]
    if first["type"] in ("value_error", "assertion_error"):
        return " ".join(str(first["ctx"]["error"]).split()) if "ctx" in first else first["msg"]
    wanted = list(dict.fromkeys(_expected(item) for item in errors))
    described = _description(model, key)
    if described and (len(wanted) > 1 or first["type"] in _BETTER_DESCRIBED):
        wanted = [described]
    found = first["input"]
    hint = closest(found, _literals(errors)) if isinstance(found, str) else ""
    return f"found {shown(found)}, expected {' or '.join(wanted)}{hint}"


def shown(value: Any) -> str:
    """A value as it stands in YAML, with its type, cut to 80 characters."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})" if value is not None else text


def _description(model: type[BaseModel], key: tuple[str, ...]) -> str | None:
    fields = [owner.model_fields[key[-1]] for owner in _models(model, key[:-1]) if key[-1] in owner.model_fields]
    return fields[0].description if fields else None


def _expected(item: ErrorDetails) -> str:
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "a mapping of keys"
    if item["type"] == "none_required":
        return "null"
    if item["type"] == "list_type":
        return "a list"
    return item["msg"].removeprefix("Input should be ")


def _literals(errors: list[ErrorDetails]) -> list[str]:
    text = " ".join(item["ctx"]["expected"] for item in errors if item["type"] == "literal_error" and "ctx" in item)
    return text.split("'")[1::2]


def _key(model: type[BaseModel], item: ErrorDetails) -> tuple[str, ...]:
    """The location as the user wrote it: pydantic mixes the branch of a union ("int", a class name) into it."""
    at: list[type[BaseModel]] = [model]
    key: list[str] = []
    for part in item["loc"]:
        if isinstance(part, int):
            key.append(str(part))
        elif item["type"] == "extra_forbidden" and part == item["loc"][-1]:
            key.append(part)
        elif any(part in owner.model_fields for owner in at):
            key.append(part)
            at = [
                m for owner in at if part in owner.model_fields for m in _inside(owner.model_fields[part].annotation)
            ]
    if item["type"] == "at_key" and "ctx" in item:
        key.extend(item["ctx"]["key"].split("."))
    return tuple(key)


def _models(model: type[BaseModel], key: Sequence[str]) -> list[type[BaseModel]]:
    """The models that may stand at `key`, or none where the key leads out of the models."""
    at: list[type[BaseModel]] = [model]
    for part in key:
        if not part.isdecimal():
            at = [
                m for owner in at if part in owner.model_fields for m in _inside(owner.model_fields[part].annotation)
            ]
    return at


def _inside(annotation: Any) -> list[type[BaseModel]]:
    return list(dict.fromkeys(_walk(annotation)))


def _walk(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _walk(inner)
