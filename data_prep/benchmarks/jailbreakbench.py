"""JailbreakBench (Hub JailbreakBench/JBB-Behaviors): a hundred harmful goals and as many harmless ones beside them.

On the Hub they are `hub_config: behaviors` with `hub_split: harmful` or `benign`. The columns are the same, so what a
file holds is what the recipe says: goals of `data.harmful` or prompts of `data.borderline`.
"""

from ..errors import UserError
from ..tables import Table
from ..usable import Rows, prompts

COLUMNS = ("Goal", "goal", "Behavior")


def read(table: Table) -> Rows:
    """The goal. `Target` is the attack's own string and never read. `UserError` for a split of the other side."""
    source = table.source
    sides = {"harmful": source.kind == "harmful", "benign": source.kind != "harmful"}
    if not table.local and not sides.get(source.hub_split, True):
        raise UserError(f"{source.path}: hub_split {source.hub_split!r} holds no {source.kind} prompts")
    return prompts(table, table.require(source.column) if source.column else table.require_one(COLUMNS))
