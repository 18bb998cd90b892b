"""XSTest (github.com/paul-rottger/exaggerated-safety; Hub walledai/XSTest): safe prompts that look unsafe, and unsafe
ones beside them."""

from ..cells import text_of
from ..errors import UserError
from ..tables import Row, Table
from ..usable import OTHER_SIDE, Rows, prompts

UNSAFE_TYPES = "contrast_"


def read(table: Table) -> Rows:
    """Rows labelled `safe`, or those labelled `unsafe` where the source is used as harmful goals.

    Files without labels tell the sides by the type's name.
    """
    wanted = "unsafe" if table.source.kind == "harmful" else "safe"
    column = table.require(table.source.column or "prompt")
    by_type = table.first(("label",)) is None and table.first(("type",)) is not None
    label = table.require("type" if by_type else "label")
    for row in table:
        found = text_of(row, label)
        side = _side_of_type(row, found) if by_type else found
        if side not in ("safe", "unsafe"):
            raise UserError(f"{row.where}, column {label!r}: unknown label; allowed: safe, unsafe")
        if side == wanted:
            yield from prompts([row], column)
        else:
            yield OTHER_SIDE


def _side_of_type(row: Row, name: str) -> str:
    if not name:
        raise UserError(f"{row.where}, column 'type': found nothing, expected the name of a type")
    return "unsafe" if name.startswith(UNSAFE_TYPES) else "safe"
