"""The rows of a file as prompts, by the name of its format.

A local file (or a Hub data set id) gives prompts in the file's order, filtered. A new format is a module in
`benchmarks/`, a line in its table and its name in `config.SourceFormat`.
"""

from .benchmarks import FORMATS, HARMFUL_ONLY
from .errors import UserError, unknown
from .tables import Source, Table
from .usable import Loaded, Usable

__all__ = ["FORMATS", "Loaded", "Source", "Usable", "load"]


def load(format: str, source: Source) -> Usable:
    """The usable rows of `source`.

    Raises:
        UserError: an unknown format, a file that cannot be read (with row and column), one of harmful requests that is
            to be answered, or filtering that leaves nothing.
    """
    if format not in FORMATS:
        raise unknown("data format", format, FORMATS)
    if format in HARMFUL_ONLY and source.kind != "harmful":
        raise UserError(f"{source.path}: found format {format!r}, harmful requests, for {source.kind} prompts")
    table, read = Table(source), FORMATS[format]
    rows = Usable(lambda: read(table))
    if not rows:
        raise UserError(f"{source.path} holds no usable rows as format {format!r} for {source.kind} prompts")
    return rows
