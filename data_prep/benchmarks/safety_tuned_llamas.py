"""safety-tuned-llamas (github.com/vinid/safety-tuned-llamas): instructions with safe answers, and lists to measure on.

The training files are Alpaca's; the files of the evaluation are one object of parallel lists.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..json_lines import is_list, parse_json, read_text
from ..opening import kind_of
from ..tables import Row, Table
from ..usable import Rows, prompts
from . import alpaca


def read(table: Table) -> Rows:
    """The instruction, with its input and its answer where there are any."""
    path = Path(table.source.path)
    if table.local and kind_of(path) == ".json" and not is_list(path):
        return prompts(_listed(path, parse_json(read_text(path), str(path))), "instruction")
    return alpaca.read(table)


def _listed(path: Path, found: Any) -> Iterator[Row]:
    listed = found.get("instructions") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise UserError(f"{path}: expected an object with a list 'instructions'")
    inputs = found.get("inputs") or [None] * len(listed)
    if not isinstance(inputs, list) or len(inputs) != len(listed):
        raise UserError(f"{path}: 'inputs' must be empty, or a list as long as 'instructions' ({len(listed)})")
    for i, (instruction, given) in enumerate(zip(listed, inputs, strict=True)):
        where = f"{path}, instruction {i}"
        if isinstance(instruction, str) and isinstance(given, str) and given.strip():
            instruction = f"{instruction.strip()}\n\n{given.strip()}"
        yield Row({"instruction": instruction}, where)
