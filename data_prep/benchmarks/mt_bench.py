"""MT-Bench (github.com/lm-sys/FastChat; Hub HuggingFaceH4/mt_bench_prompts): questions of two turns."""

from ..cells import text_of
from ..errors import UserError
from ..schema import Conversation
from ..tables import Row, Table
from ..usable import NO_TEXT, Loaded, Rows

TURNS = ("turns", "prompt")


def read(table: Table) -> Rows:
    """The first turn, with its reference where there is one: the second rests on what a model answers to it."""
    column = table.require(table.source.column or table.first(TURNS) or TURNS[0])
    reference = table.first(("reference",))
    for row in table:
        text = _first(row, column)
        answer = _first(row, reference) if reference else ""
        yield Loaded(Conversation.of(text), answer or None) if text else NO_TEXT


def _first(row: Row, column: str) -> str:
    found = row.cells.get(column)
    if found is None or found == []:
        return ""
    if not isinstance(found, list):
        raise UserError(f"{row.where}, column {column!r}: expected a list of turns")
    return text_of(Row({column: found[0]}, row.where), column)
