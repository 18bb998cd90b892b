"""Jailbreak templates in the user's files: texts by group, tables of texts, and stored attack conversations."""

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cells import asked_in, text_of
from .errors import UserError
from .families import Template
from .json_lines import is_list, parse_json, read_text
from .schema import Turn
from .tables import Row, Source, Table, shown

TEMPLATE_COLUMNS = ("text", "template", "prompt", "messages", "conversations", "conversation")
# A group's name stands in ids, figures and reports: it must not be a template's text.
LONGEST_NAME = 60


def read_templates(path: str, placeholder: str) -> dict[str, list[Template]]:
    """`{group: [template, ...]}` of a file.

    It is a JSON object `{group: [text, ...]}`; a table with a text column (GPTFuzz's layout) or a column of messages,
    by its group column or the file's stem; or JailbreakBench's artefact of one attack. A last turn of the assistant's
    is how its answer is made to begin. Where a row has a column `goal`, the goal's words become the placeholder.
    Raises `UserError` with the row's place.
    """
    if Path(path).suffix == ".json" and os.path.isfile(path) and not is_list(Path(path)):
        data = parse_json(read_text(Path(path)), path)
        if isinstance(data, dict) and isinstance(attacks := data.get("jailbreaks"), list):
            return _grouped(path, _attacks(path, attacks), "prompt", placeholder)
        if isinstance(data, dict):
            return _checked_groups(path, data)
    rows = Table(Source(path, "harmful"))
    return _grouped(path, rows, rows.require_one(TEMPLATE_COLUMNS), placeholder)


def _grouped(path: str, rows: Iterable[Row], column: str, placeholder: str) -> dict[str, list[Template]]:
    groups: dict[str, list[Template]] = {}
    for row in rows:
        name = text_of(row, "group") or Path(path).stem
        groups.setdefault(_named(name, row.where), []).append(_template(row, column, placeholder))
    return groups


def _attacks(path: str, attacks: list[Any]) -> Iterable[Row]:
    for i, cells in enumerate(attacks):
        if not isinstance(cells, dict):
            raise UserError(f"{path}, attack {i}: expected an object with 'goal' and 'prompt'")
        # An attack that found nothing is stored without a prompt.
        if cells.get("prompt") is not None:
            yield Row(cells, f"{path}, attack {i}")


def _template(row: Row, column: str, placeholder: str) -> Template:
    if not isinstance(row.cells.get(column), list):
        text = text_of(row, column)
        return _around(row, Template(text), placeholder)
    asked = asked_in(row, column)
    if asked is None:
        raise UserError(f"{row.where}, column {column!r}: found a conversation without a question at its end")
    *before, last = asked.conversation.turns
    return _around(row, Template(last.text, tuple(before), asked.answer or ""), placeholder)


def _around(row: Row, template: Template, placeholder: str) -> Template:
    """The template with its goal, where the row names one, taken out."""
    goal = text_of(row, "goal")
    texts = [template.text, *(turn.text for turn in template.before)]
    if not goal or any(placeholder in text for text in texts):
        return template
    words = re.compile(r"\s+".join(map(re.escape, goal.split())), re.IGNORECASE)
    if not any(words.search(text) for text in texts):
        raise UserError(
            f"{row.where}: neither the goal's words nor {placeholder!r} stand in the attack; an attack that is made "
            "for one goal alone cannot be put around others"
        )

    def without(text: str) -> str:
        return words.sub(lambda _: placeholder, text)

    before = tuple(Turn(turn.role, without(turn.text)) for turn in template.before)
    return replace(template, text=without(template.text), before=before)


def _checked_groups(path: str, data: dict[str, object]) -> dict[str, list[Template]]:
    groups: dict[str, list[Template]] = {}
    for number, (name, templates) in enumerate(data.items()):
        where = f"{path}, group {''.join(shown([name])) or number}"
        if not isinstance(templates, list):
            raise UserError(f"{where}: must be a list of template strings, found {type(templates).__name__}")
        checked: list[Template] = []
        for i, text in enumerate(templates):
            if not isinstance(text, str):
                raise UserError(f"{where}, template {i}: found {type(text).__name__}, expected text")
            # Checked as a cell is, and kept to the last space: its edges may be part of the jailbreak.
            text_of(Row({"text": text}, f"{where}, template {i}"), "text")
            checked.append(Template(text))
        groups[_named(name, where)] = checked
    if not any(groups.values()):
        raise UserError(f"{path} holds no templates")
    return groups


def _named(name: str, where: str) -> str:
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable() or set("[]") & set(name):
        raise UserError(f"{where}: a group's name has 1 to {LONGEST_NAME} printable characters, without [ and ]")
    return name
