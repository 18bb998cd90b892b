"""What a recipe may be made of, before its keys are known: plain values that survive being written and read again."""

from __future__ import annotations

import math
from typing import Any

DEEPEST = 32
"""Levels of a recipe; the deepest one that a section has is 5."""
MOST_VALUES = 100_000
"""Values in a recipe. A file of a few lines can name a billion of them through aliases."""
LARGEST = 2**63
"""Whole numbers below it fit every file format and library that they are handed to."""


def plain_tree(tree: Any, at: tuple[str, ...] = ()) -> Any:
    """A copy in which no part is shared, so that a change in one place is no change in another.

    Args:
        at: the key that `tree` is the value of, for the errors.

    Raises:
        ValueError: a value that is no text, number, truth value, null, list or mapping; a number that is not finite;
            a key that is no text; text that cannot be written; too many levels or values. Names the key.
    """
    return _Copier().copy(tree, at)


class _Copier:
    def __init__(self) -> None:
        self._values = 0

    def copy(self, value: Any, key: tuple[str, ...]) -> Any:
        self._values += 1
        if self._values > MOST_VALUES:
            raise ValueError(f"{_at(key)}more than {MOST_VALUES:,} values, counting what aliases (*name) repeat")
        if len(key) > DEEPEST:
            raise ValueError(f"{_at(key[:3])}more than {DEEPEST} levels deep")
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise ValueError(f"{_at(key)}found the key {name!r} ({_kind(name)}), expected text")
                _check_text(name, (*key, "(a key)"))
            return {name: self.copy(part, (*key, name)) for name, part in value.items()}
        if isinstance(value, list):
            return [self.copy(part, (*key, str(index))) for index, part in enumerate(value)]
        _check(value, key)
        return value


def _check(value: Any, key: tuple[str, ...]) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        _check_text(value, key)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{_at(key)}found {value} (float), expected a finite number")
    elif isinstance(value, int):
        if not -LARGEST < value < LARGEST:
            raise ValueError(f"{_at(key)}found a number of {value.bit_length()} bits, expected one below 2**63")
    else:
        raise ValueError(f"{_at(key)}found {value!r} ({_kind(value)}), expected text, a number, true, false or null")


def _check_text(text: str, key: tuple[str, ...]) -> None:
    if "\0" in text:
        raise ValueError(f"{_at(key)}found a NUL character at position {text.index(chr(0))}, expected text without")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_at(key)}found half a surrogate pair at position {error.start}, expected text") from None


def _at(key: tuple[str, ...]) -> str:
    return ".".join(part if len(part) <= 60 else f"{part[:57]}..." for part in key) + ": " if key else ""


def _kind(value: Any) -> str:
    return type(value).__name__
