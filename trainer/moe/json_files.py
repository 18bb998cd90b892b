"""JSON files of our own formats, read with their types and bounds: what is wrong is named by file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

M = TypeVar("M", bound=BaseModel)


class Record(BaseModel):
    """An object of a file. Values are not coerced, and numbers are finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


def parse(path: Path, kind: type[M], what: str) -> M:
    """The file as an object of `kind`; `what` says in an error what it is not: `an expert set`.

    Raises:
        ValueError: not JSON, a key that is missing, of another type or out of bounds; one line with file and key.
        OSError: the file cannot be read.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: not {what}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """The first error as `key: found x, expected y`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("json_invalid", "missing", "value_error"):
        message = f"found {_short(first['input'])}, expected {message.removeprefix('Input should be ')}"
    if first["type"] == "missing":
        message = "the key is missing"
    return " ".join((f"{where}: {message}" if where else message).split())


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
