"""HarmfulQA (github.com/declare-lab/red-instruct): harmful questions, by topic and subtopic.

The repository's file is one object, topic -> subtopic -> questions; the Hub's rows (declare-lab/HarmfulQA) are flat.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..json_lines import is_list, parse_json, read_text
from ..opening import kind_of
from ..tables import Row, Table
from ..usable import Rows, prompts


def read(table: Table) -> Rows:
    """The questions, in the file's order."""
    path = Path(table.source.path)
    if table.local and kind_of(path) == ".json" and not is_list(path):
        return prompts(_nested(path, parse_json(read_text(path), str(path))), "question")
    return prompts(table, table.require(table.source.column or "question"))


def _nested(path: Path, topics: Any) -> Iterator[Row]:
    for i, subtopics in enumerate(_values(topics, f"{path}")):
        for j, questions in enumerate(_values(subtopics, f"{path}, topic {i}")):
            where = f"{path}, topic {i}, subtopic {j}"
            if not isinstance(questions, list):
                raise UserError(f"{where}: expected a list of questions, found {type(questions).__name__}")
            for k, question in enumerate(questions):
                yield Row({"question": question}, f"{where}, question {k}")


def _values(found: Any, where: str) -> list[Any]:
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected topics, subtopics and lists of questions, found {type(found).__name__}")
    return list(found.values())
