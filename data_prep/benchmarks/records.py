"""The user's own table: a prompt column, text or chat messages, and where there is one an answer column."""

from ..tables import Table
from ..usable import Rows, prompts

PROMPT_COLUMNS = (
    "prompt", "text", "goal", "Goal", "instruction", "question", "Behavior", "forbidden_prompt", "messages",
    "conversations", "conversation", "Question", "Prompt", "query", "input",
)  # fmt: skip
ANSWER_COLUMNS = ("answer", "output")


def read(table: Table) -> Rows:
    """Any table: the column that the recipe names, or the first known one; answers are optional."""
    column = table.require(table.source.column or table.first(PROMPT_COLUMNS) or PROMPT_COLUMNS[0])
    named = table.source.answer_column
    answers = table.require(named) if named else table.first(n for n in ANSWER_COLUMNS if n != column)
    return prompts(table, column, answers)


def read_answered(table: Table) -> Rows:
    """Question and answer columns; both are needed."""
    column = table.require(table.source.column or "question")
    return prompts(table, column, table.require(table.source.answer_column or "answer"))
