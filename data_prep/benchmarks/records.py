"""The user's own table: a prompt column, text or chat messages, and where there is one an answer column."""

from collections.abc import Mapping

from ..tables import Row, Table
from ..usable import Rows, prompts

PROMPT_COLUMNS = (
    "prompt", "text", "goal", "Goal", "instruction", "question", "Behavior", "forbidden_prompt", "messages",
    "conversations", "conversation", "Question", "Prompt", "query", "input",
)  # fmt: skip
ANSWER_COLUMNS = ("answer", "output")


OTHER_VALUE = "another value in a column of `only`"


def read(table: Table) -> Rows:
    """Any table: the column that the recipe names, or the first known one; answers are optional.

    Of a table that holds several kinds of rows, those with the values of `only` alone.
    """
    column = table.require(table.source.column or table.first(PROMPT_COLUMNS) or PROMPT_COLUMNS[0])
    named = table.source.answer_column
    answers = table.require(named) if named else table.first(n for n in ANSWER_COLUMNS if n != column)
    wrong = table.require(table.source.wrong) if table.source.wrong else None
    only = {table.require(name): value for name, value in table.source.only.items()}
    for row in table:
        if _has(row, only):
            yield from prompts([row], column, answers, wrong)
        else:
            yield OTHER_VALUE


def _has(row: Row, only: Mapping[str, bool | int | str]) -> bool:
    return all(row.cells.get(name) == value for name, value in only.items())


def read_answered(table: Table) -> Rows:
    """Question and answer columns; both are needed."""
    column = table.require(table.source.column or "question")
    return prompts(table, column, table.require(table.source.answer_column or "answer"))
