"""Tables as their files have them: csv, json, jsonl and parquet files, and Hub data sets.

Nothing is guessed and nothing is kept elsewhere: a CSV row with another number of cells than the header is an error, a
quote that is never closed too, and no copy of the data is written. Byte-order marks, CRLF line ends and multi-line
cells are read as spreadsheets write them.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError, unknown
from .json_lines import parse_json, read_json_lines, read_text
from .schema import Kind

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
# A header that was forgotten makes column names of the first row's texts; only what looks like a name is shown.
_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_.-]{0,31}$")
# Cells of columns that are not read may be of any size; `cells.MAX_CHARACTERS` bounds those that are.
_ANY_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Source:
    """What a loader reads: `kind` matters to formats that hold both sides (xstest).

    `answer`: column with the answers, where a recipe names one; `wrong`: with answers that are not right. `only`:
    column -> the value that a row must have.
    """

    path: str
    kind: Kind
    column: str | None = None
    revision: str | None = None
    hub_split: str = "train"
    hub_config: str | None = None
    answer: str | None = None
    wrong: str | None = None
    only: Mapping[str, bool | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row. `where` says its place for an error: file, row counted from 0, and the line where there are lines."""

    cells: dict[str, object]
    where: str


def shown(names: Iterable[object]) -> list[str]:
    """The names that are safe to print: short words without spaces. Others may be a row's text."""
    return [str(name) for name in names if _NAME.match(str(name))]


def read_rows(source: Source) -> list[Row]:
    """All rows of a local file or a Hub data set, in order. Raises `UserError` where it cannot be read or has none."""
    path = Path(source.path)
    if not source.path or "\0" in source.path:
        raise UserError(f"no such file: {source.path!r} (expected a local file or a Hub data set id, owner/name)")
    # Of os.path, because pathlib raises where a name is too long for a file.
    if os.path.isfile(path):
        rows = _read_file(path)
    elif not os.path.exists(path) and path.suffix not in SUFFIXES and HUB_ID.match(source.path):
        rows = [Row(cells, f"{source.path}, row {i}") for i, cells in enumerate(_read_hub(source))]
    else:
        raise UserError(f"no such file: {source.path} (expected a local file or a Hub data set id, owner/name)")
    if not rows:
        raise UserError(f"{source.path} holds no rows")
    return rows


def columns(rows: Iterable[Row]) -> list[str]:
    """Every column that a row has, in the order of their first use."""
    return list(dict.fromkeys(name for row in rows for name in row.cells))


def no_column(path: str, column: str, found: list[str]) -> UserError:
    """The error for a column that a table lacks. It quotes names, never what may be a cell of a forgotten header."""
    names = shown(found)
    if not names:
        return UserError(
            f"column of {path} {column!r} is missing; found {len(found)} columns without a name like one: the first "
            "row of a csv must name its columns"
        )
    error = unknown(f"column of {path}", column, names)
    hidden = len(found) - len(names)
    return (
        UserError(f"{error} (and {hidden} not shown: the first row of a csv must name its columns)")
        if hidden
        else error
    )


def _read_file(path: Path) -> list[Row]:
    if path.suffix not in SUFFIXES:
        raise unknown(f"file type of {path}", path.suffix, SUFFIXES)
    if path.suffix == ".jsonl":
        return [Row(row, f"{path}, row {i} (line {line})") for i, (line, row) in enumerate(read_json_lines(path))]
    if path.suffix == ".csv":
        return _read_csv(path)
    data = _read_parquet(path) if path.suffix == ".parquet" else parse_json(read_text(path), str(path))
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a list of objects, found {type(data).__name__}")
    for i, cells in enumerate(data):
        if not isinstance(cells, dict):
            raise UserError(f"{path}, row {i}: expected an object, found {type(cells).__name__}")
    return [Row(cells, f"{path}, row {i}") for i, cells in enumerate(data)]


def _read_csv(path: Path) -> list[Row]:
    rows: list[Row] = []
    header: list[str] | None = None
    before = csv.field_size_limit(_ANY_SIZE)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            line = 1
            for cells in reader:
                where, line = f"{path}, row {len(rows)} (line {line})", reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = _header(path, cells)
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{where}: found {len(cells)} cells, the first row has {len(header)}; a cell with a comma "
                        "must stand in double quotes"
                    )
                # A column without a name is an index that a data frame wrote.
                rows.append(Row({name: cell for name, cell in zip(header, cells, strict=True) if name}, where))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except csv.Error as error:
        raise UserError(
            f"{path}, row {len(rows)} (line {line}) cannot be read as csv: {error}; is a double quote never closed?"
        ) from error
    finally:
        csv.field_size_limit(before)
    return rows


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = [name for name, n in Counter(names).items() if n > 1 and name]
    if twice:
        raise UserError(f"{path}: the first row names {len(twice)} columns twice; expected each name once")
    return names


def _read_parquet(path: Path) -> list[dict[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        if len(set(table.column_names)) < len(table.column_names):
            raise UserError(f"{path}: two columns have one name; expected each name once")
        found: list[dict[str, object]] = table.to_pylist()
    except UserError:
        raise
    # Arrow's own errors are ValueError, OSError, TypeError, KeyError or a bare one; a page may hold broken UTF-8.
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {_first_line(error)}") from error
    return found


def _read_hub(source: Source) -> list[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data = load_dataset(source.path, source.hub_config, split=source.hub_split, revision=source.revision)
        return [dict(row) for row in data]
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source.path} is no local file, and the Hub gave no data set: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
