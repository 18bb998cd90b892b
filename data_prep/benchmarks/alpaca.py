"""Alpaca (github.com/tatsu-lab/stanford_alpaca; Hub tatsu-lab/alpaca): instructions with an input and an output.

The repository's seed tasks keep both in `instances`; the first of them is taken.
"""

from collections.abc import Iterator

from ..cells import text_of
from ..errors import UserError
from ..tables import Row, Table
from ..usable import Rows, prompts


def read(table: Table) -> Rows:
    """`instruction`, a blank line, and `input` where it is not empty; `output` is the answer."""
    table.require("instruction")
    nested = table.first(("instances",)) is not None
    return prompts(_joined(table, nested), "instruction", "output" if nested else table.first(("output",)))


def _joined(table: Table, nested: bool) -> Iterator[Row]:
    for row in table:
        if nested:
            row = Row(row.cells | _instance(row), row.where)
        text = "\n\n".join(filter(None, (text_of(row, "instruction"), text_of(row, "input"))))
        yield Row(row.cells | {"instruction": text}, row.where)


def _instance(row: Row) -> dict[str, object]:
    found = row.cells.get("instances")
    first = found[0] if isinstance(found, list) and found else None
    if not isinstance(first, dict):
        raise UserError(f"{row.where}, column 'instances': expected a list of objects with 'input' and 'output'")
    return {"input": first.get("input"), "output": first.get("output")}
