"""What one cell of a table holds: a text, or a conversation as chat messages. Nothing else becomes a prompt.

Errors name file, row and column, what was found and what is allowed; they quote no text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import UserError
from .schema import Conversation, Speaker, Turn
from .tables import Row

MAX_CHARACTERS = 100_000
"""Longest prompt (all turns together), answer and template: far beyond what a row of training can hold."""

ROLES: dict[str, dict[str, Speaker]] = {
    "role": {"system": "system", "user": "user", "assistant": "assistant"},
    "from": {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
}
"""Key that names a message's speaker -> the names that it may have; `from` is ShareGPT's."""
_CONTENT = {"role": "content", "from": "value"}
_CALLS = ("tool_calls", "function_call")
# Messages that a CSV or a careless export turned into text.
_WRITTEN_OUT = re.compile(r"""^\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")


_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Asked:
    """What a cell asks, and the answer that its last turn gives, where that is the assistant's."""

    conversation: Conversation
    answer: str | None = None


def text_of(row: Row, column: str) -> str:
    """The text of a cell without outer spaces; "" where it is empty or absent. `UserError` for anything else."""
    value, where = row.cells.get(column), f"{row.where}, column {column!r}"
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: found {_kind(value)}, expected text")
    return _plain(value, where)


def texts_of(row: Row, column: str) -> tuple[str, ...]:
    """The texts of a cell that holds one or a list of them; empty ones are left out. `UserError` for anything else."""
    value, where = row.cells.get(column), f"{row.where}, column {column!r}"
    if not isinstance(value, list):
        return tuple(filter(None, [text_of(row, column)]))
    if not all(isinstance(text, str) for text in value):
        raise UserError(f"{where}: found a list of other things than texts, expected texts")
    return tuple(filter(None, (_plain(text, where) for text in value)))


def asked_in(row: Row, column: str) -> Asked | None:
    """The prompt of a cell: its text as one user turn, or its messages; None where there is no text.

    Messages are a list of `{role, content}` (or ShareGPT's `{from, value}`): at most one system turn, first, then user
    and assistant in turn, from the user's. A last turn of the assistant's is the answer. Raises `UserError` otherwise.
    """
    value, where = row.cells.get(column), f"{row.where}, column {column!r}"
    if isinstance(value, list):
        return _conversation(value, where)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: found {_kind(value)}, expected text or a list of messages")
    text = text_of(row, column)
    if _WRITTEN_OUT.match(text):
        raise UserError(f"{where}: found messages written out as text; give them as lists, in json, jsonl or parquet")
    return Asked(Conversation.of(text)) if text else None


def _conversation(messages: list[object], where: str) -> Asked | None:
    turns = [_turn(message, f"{where}, message {i}") for i, message in enumerate(messages)]
    start = 1 if turns and turns[0].role == "system" else 0
    talk = turns[start:]
    if not talk:
        raise UserError(f"{where}: found messages without a user's turn; expected at least one")
    for i, turn in enumerate(talk):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise UserError(
                f"{where}, message {start + i}: found the turn of {turn.role!r}, expected {expected!r}: a system turn "
                "may come first, then user and assistant in turn"
            )
    if len("".join(turn.text for turn in turns)) > MAX_CHARACTERS:
        raise UserError(f"{where}: found messages of more than {MAX_CHARACTERS} characters together")
    answer = None
    if talk[-1].role == "assistant":
        answer = talk.pop().text or None
    if any(not turn.text for turn in talk[:-1]):
        raise UserError(f"{where}: found an empty turn in the middle of a conversation")
    return Asked(Conversation((*turns[:start], *talk)), answer) if talk[-1].text else None


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise UserError(f"{where}: found {_kind(message)}, expected an object with 'role' and 'content'")
    key = "role" if message.get("role") is not None else "from"
    role, content = message.get(key), message.get(_CONTENT[key])
    if role is None:
        raise UserError(f"{where}: has no 'role'; expected 'role' and 'content'")
    if not isinstance(role, str) or role not in ROLES[key]:
        name = f" {role!r}" if isinstance(role, str) and re.fullmatch(r"[a-z_]{1,20}", role) else ""
        raise UserError(f"{where}: unknown role{name}; allowed: {', '.join(ROLES[key])}")
    if any(message.get(call) for call in _CALLS):
        raise UserError(f"{where}: found a call of a tool; allowed: turns of text")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}, part {i}") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise UserError(f"{where}: {_CONTENT[key]!r} is {_kind(content)}, expected text or a list of text parts")
    return Turn(ROLES[key][role], _plain(content, where))


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        name = f" of type {kind!r}" if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,20}", kind) else ""
        raise UserError(f"{where}: found a part{name}; allowed: {{type: text, text: ...}}")
    return text


def _plain(text: str, where: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: found {len(text)} characters; allowed: at most {MAX_CHARACTERS}")
    if _NO_CHARACTER.search(text):
        raise UserError(f"{where}: found a NUL or half a surrogate pair, which no text holds")
    return text.strip()


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names = {int: "a number", float: "a number", list: "a list", dict: "an object", str: "text", bytes: "bytes"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
