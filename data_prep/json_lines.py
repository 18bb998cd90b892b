"""JSON and JSON Lines, read strictly: no key twice, no nesting without end, one line of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import UserError


def parse_json(text: str, where: str) -> Any:
    """The value that `text` holds.

    Raises:
        UserError: no JSON, nested too deeply, a number of thousands of digits, or a key twice in one object (the first
            would be lost). Begins with `where`, quotes nothing of the text.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, without a byte-order mark. Raises `UserError` naming the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty.

    Raises:
        UserError: no UTF-8 text, or a line that holds no JSON object; names the file and the line.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        rows.append((number, row))
    return rows


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has one key twice")
    return found
