"""BeaverTails (Hub PKU-Alignment/BeaverTails): questions with answers, labelled safe or unsafe by the answer.

On the Hub the parts are splits: `hub_split: 30k_train`. A question stands with several answers.
"""

from ..errors import UserError
from ..tables import Row, Table
from ..usable import OTHER_SIDE, Rows, prompts

LABELS = {"true": True, "false": False}


def read(table: Table) -> Rows:
    """The questions that somebody answered unsafely: these can be harmful. No answer is read.

    A safe answer may be a refusal, so rows labelled safe say nothing of the question and are left out.
    """
    label = table.require("is_safe")
    column = table.require(table.source.column or "prompt")
    for row in table:
        if _is_safe(row, label):
            yield OTHER_SIDE
        else:
            yield from prompts([row], column)


def _is_safe(row: Row, label: str) -> bool:
    found = row.cells.get(label)
    if isinstance(found, str):
        found = LABELS.get(found.strip().lower())
    if not isinstance(found, bool):
        raise UserError(f"{row.where}, column {label!r}: unknown label; allowed: true, false")
    return found
