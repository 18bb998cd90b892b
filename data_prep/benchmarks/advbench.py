"""AdvBench (github.com/llm-attacks/llm-attacks; Hub walledai/AdvBench): harmful requests with an attack's target."""

from ..tables import Table
from ..usable import Rows, prompts

COLUMNS = ("goal", "prompt")


def read(table: Table) -> Rows:
    """The request. `target` is the attack's own string and never read."""
    column = table.source.column
    return prompts(table, table.require(column) if column else table.require_one(COLUMNS))
