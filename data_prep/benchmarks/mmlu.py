"""MMLU (github.com/hendrycks/test; Hub cais/mmlu): questions of many subjects with four options each.

The repository's csv files have no header: question, four options, the right letter.
"""

from ..cells import text_of
from ..errors import UserError
from ..tables import Row, Table
from ..usable import NO_TEXT, Rows
from .choices import LETTERS, lettered

HEADER = ("question", "A", "B", "C", "D", "answer")


def read(table: Table) -> Rows:
    """The question with its options; the answer is a letter."""
    if table.is_csv and "question" not in table.first_cells():
        table = Table(table.source, HEADER)
    question = table.require("question")
    nested = table.first(("choices",)) is not None
    for name in ("answer", *(() if nested else HEADER[1:5])):
        table.require(name)
    for row in table:
        text, options = text_of(row, question), _options(row, nested)
        yield lettered(text, options, _right(row, len(options))) if text else NO_TEXT


def _options(row: Row, nested: bool) -> list[str]:
    found = row.cells.get("choices") if nested else [row.cells.get(name) for name in HEADER[1:5]]
    if not isinstance(found, list) or not 2 <= len(found) <= len(LETTERS):
        raise UserError(f"{row.where}, column 'choices': expected a list of 2 to {len(LETTERS)} options")
    return [text_of(Row({"choices": option}, row.where), "choices") for option in found]


def _right(row: Row, options: int) -> int:
    """The place of the right option: a number from 0, or its letter."""
    found = row.cells.get("answer")
    if isinstance(found, str):
        found = LETTERS.find(found.strip()) if len(found.strip()) == 1 else -1
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < options:
        raise UserError(f"{row.where}, column 'answer': expected the place of an option from 0, or its letter")
    return found
