"""JSON and JSON Lines, read strictly and row by row: no key twice, no nesting without end, one line of error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import UserError
from .opening import open_text, readable

_PIECE = 1 << 20
"""Characters read at once of a JSON file; what is held of it is a few of these, or the longest row."""
_SPACES = " \t\n\r"
# A piece may end in the middle of a word or an escape of JSON ("-Infinity", a surrogate pair).
_LONGEST_MARK = 16


def parse_json(text: str, where: str) -> Any:
    """The value that `text` holds.

    Raises:
        UserError: no JSON, nested too deeply, a number of thousands of digits, or a key twice in one object (the first
            would be lost). Begins with `where`, quotes nothing of the text.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, without a byte-order mark. Raises `UserError` naming the file."""
    with open_text(path) as file, readable(path):
        return file.read()


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty, one line in memory at a time.

    Raises:
        UserError: no UTF-8 text, or a line that holds no JSON object; names the file and the line.
    """
    # Only "\n" ends a line: texts may hold Unicode's own line separators.
    with open_text(path, newline="\n") as file, readable(path):
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = parse_json(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
            yield number, row


def read_json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """(line it begins in, item) of a JSON file that holds a list, one piece of the file in memory at a time.

    Raises:
        UserError: no UTF-8 text, no JSON, or another value than a list; names the file, and row and line.
    """
    with open_text(path, newline="") as file, readable(path):
        yield from _items(_Text(file, path))


def is_list(path: Path) -> bool:
    """Whether a JSON file begins as a list. Raises `UserError` where it is no text."""
    with open_text(path) as file, readable(path):
        while piece := file.read(_PIECE):
            if found := piece.lstrip():
                return found[0] == "["
    return False


class _Text:
    """The text of a file as far as it is read: `text[at:]` is still to be parsed, and begins in `line`."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.line = "", 0, 1

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        rest = self.text[self.at :]
        # As much again as there is, so that a row of any length is parsed a few times only.
        piece = self.file.read(max(_PIECE, len(rest)))
        self.text, self.at = rest + piece, 0
        return bool(piece)

    def go_to(self, place: int) -> None:
        self.line += self.text.count("\n", self.at, place)
        self.at = place

    def mark(self) -> str:
        """The next character that is no space, which is not taken; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACES:
                self.go_to(self.at + 1)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self, what: str, row: int) -> None:
        found = self.mark()
        if found != what:
            raise self.error(row, f"expected {what!r}" + ("" if found else ", found the end of the file"))
        self.go_to(self.at + 1)

    def value(self, row: int) -> Any:
        while True:
            try:
                found, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Cut in the middle of the row, or wrong.
                may_be_cut = error.pos > len(self.text) - _LONGEST_MARK or "Unterminated" in error.msg
                if may_be_cut and self.more():
                    continue
                line = self.line + self.text.count("\n", self.at, error.pos)
                raise self.error(row, f"{error.msg}: line {line} column {error.colno}") from error
            except RecursionError as error:
                raise self.error(row, "nested too deeply") from error
            except ValueError as error:
                raise self.error(row, str(error)) from error
            # A number may go on in the next piece.
            if end == len(self.text) and self.more():
                continue
            self.go_to(end)
            return found

    def error(self, row: int, what: str) -> UserError:
        return UserError(f"{self.path}, row {row} (line {self.line}): not valid JSON: {what}")


def _items(text: _Text) -> Iterator[tuple[int, Any]]:
    text.take("[", 0)
    row = 0
    while text.mark() != "]":
        if row:
            text.take(",", row)
            text.mark()
        yield text.line, text.value(row)
        row += 1
    text.take("]", row)
    if text.mark():
        raise text.error(row, "text behind the end of the list")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has one key twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)
