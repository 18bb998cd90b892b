"""Reading rows: one function per file format, behind the table `FORMATS`.

A loader gets the path of a local file (or a Hub data set id) and yields prompts in the file's order, filtered. Real
files come with byte-order marks, CRLF line ends and multi-line cells; `csv` and `utf-8-sig` take care of those.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError, unknown
from .json_lines import read_json_lines
from .schema import Kind

Row = dict[str, object]
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
PROMPT_COLUMNS = ("prompt", "text", "goal", "Goal", "instruction", "question", "Behavior", "forbidden_prompt")
ANSWER_COLUMNS = ("answer", "output")
SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Source:
    """What a loader reads: `kind` matters to formats that hold both sides (xstest)."""

    path: str
    kind: Kind
    column: str | None = None
    revision: str | None = None
    hub_split: str = "train"
    hub_config: str | None = None


@dataclass(frozen=True)
class Loaded:
    """One usable row: the prompt and, where the file has it, its answer."""

    text: str
    answer: str | None = None


def read_rows(source: Source) -> list[Row]:
    """All rows of a local csv, json, jsonl or parquet file or of a Hub data set; raises `UserError` if none."""
    path = Path(source.path)
    if path.is_file():
        rows = _read_file(path)
    elif not path.exists() and path.suffix not in SUFFIXES and HUB_ID.match(source.path):
        rows = _read_hub(source)
    else:
        raise UserError(f"no such file: {source.path} (expected a local file or a Hub data set id, owner/name)")
    if not rows:
        raise UserError(f"{source.path} holds no rows")
    return rows


def _read_file(path: Path) -> list[Row]:
    if path.suffix not in SUFFIXES:
        raise unknown(f"file type of {path}", path.suffix, SUFFIXES)
    if path.suffix == ".parquet":
        from datasets import Dataset

        return [dict(row) for row in Dataset.from_parquet(str(path))]
    try:
        if path.suffix == ".jsonl":
            return [row for _, row in read_json_lines(path)]
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return [dict(row) for row in csv.DictReader(file)]
            data = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise UserError(f"{path} must hold a list of objects, found {type(data).__name__}")
    return data


def _read_hub(source: Source) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        data = load_dataset(source.path, source.hub_config, split=source.hub_split, revision=source.revision)
    except (DatasetNotFoundError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source.path} is no local file, and the Hub gave no data set: {reason}") from error
    return [dict(row) for row in data]


def require(source: Source, rows: list[Row], column: str) -> str:
    """`column`, if the rows have it; raises `UserError` naming the file and the closest column otherwise."""
    if column not in rows[0]:
        raise unknown(f"column of {source.path}", column, (str(name) for name in rows[0]))
    return column


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value).strip()


def _loaded(rows: Iterable[Row], column: str, answer: str | None = None) -> list[Loaded]:
    pairs = ((_text(row, column), _text(row, answer) if answer else None) for row in rows)
    return [Loaded(text, reply) for text, reply in pairs if text]


def _first(rows: list[Row], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in rows[0]), None)


def load_records(source: Source) -> list[Loaded]:
    """Any table: `source.column`, or the first known prompt column; the answer column is optional."""
    rows = read_rows(source)
    column = source.column or _first(rows, PROMPT_COLUMNS) or PROMPT_COLUMNS[0]
    return _loaded(rows, require(source, rows, column), _first(rows, ANSWER_COLUMNS))


def load_advbench(source: Source) -> list[Loaded]:
    """AdvBench: the `goal` column. Its `target` is the attack's own string and never read."""
    rows = read_rows(source)
    return _loaded(rows, require(source, rows, source.column or "goal"))


def load_xstest(source: Source) -> list[Loaded]:
    """XSTest: rows labelled `safe`, or those labelled `unsafe` when the source is used as harmful goals."""
    rows = read_rows(source)
    column, label = require(source, rows, source.column or "prompt"), require(source, rows, "label")
    wanted = "unsafe" if source.kind == "harmful" else "safe"
    return _loaded((row for row in rows if _text(row, label) == wanted), column)


def load_alpaca(source: Source) -> list[Loaded]:
    """Alpaca: `instruction`, a blank line, and `input` where it is not empty; `output` is the answer."""
    rows = read_rows(source)
    require(source, rows, "instruction")
    answer = "output" if "output" in rows[0] else None
    joined: list[Row] = [
        {**row, "instruction": "\n\n".join(filter(None, (_text(row, "instruction"), _text(row, "input"))))}
        for row in rows
    ]
    return _loaded(joined, "instruction", answer)


def load_qa(source: Source) -> list[Loaded]:
    """Question and answer columns; both are needed."""
    rows = read_rows(source)
    return _loaded(rows, require(source, rows, source.column or "question"), require(source, rows, "answer"))


FORMATS: dict[str, Callable[[Source], list[Loaded]]] = {
    "records": load_records,
    "advbench": load_advbench,
    "xstest": load_xstest,
    "alpaca": load_alpaca,
    "qa": load_qa,
}


def load(format: str, source: Source) -> list[Loaded]:
    """The usable rows of `source`; raises `UserError` for an unknown format or when filtering leaves none."""
    if format not in FORMATS:
        raise unknown("data format", format, FORMATS)
    rows = FORMATS[format](source)
    if not rows:
        raise UserError(f"{source.path} holds no usable rows as format {format!r} for {source.kind} prompts")
    return rows
