"""StrongREJECT (github.com/alexandrasouly/strongreject; Hub walledai/StrongREJECT): forbidden prompts."""

from ..tables import Table
from ..usable import Rows, prompts

COLUMNS = ("forbidden_prompt", "prompt")


def read(table: Table) -> Rows:
    """The prompt, with its line breaks."""
    column = table.source.column
    return prompts(table, table.require(column) if column else table.require_one(COLUMNS))
