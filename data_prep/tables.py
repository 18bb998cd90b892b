"""Tables as their files have them: csv, json, jsonl and parquet files, packed or not, and Hub data sets.

Nothing is guessed and nothing is kept elsewhere: a CSV row with another number of cells than the header is an error, a
quote that is never closed too, and no copy of the data is written. Byte-order marks, CRLF line ends and multi-line
cells are read as spreadsheets write them. A table is read from its start whenever it is gone through, a row at a time:
what it holds in memory does not grow with it.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import UserError, unknown
from .json_lines import is_list, parse_json, read_json_lines, read_json_list, read_text
from .opening import kind_of, open_text, readable
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

    `answer_column`: with the answers, where a recipe names one; `wrong`: with answers that are not right. `only`:
    column -> the value that a row must have.
    """

    path: str
    kind: Kind
    column: str | None = None
    revision: str | None = None
    hub_split: str = "train"
    hub_config: str | None = None
    answer_column: str | None = None
    hub_folder: str | None = None
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


class Table:
    """The rows of a local file or a Hub data set, in order; every iteration reads them anew.

    `header`: the names of a csv's columns where the file itself has none.
    Iterating raises `UserError` for what cannot be read, with the row's place; making one where there is no such file.
    """

    def __init__(self, source: Source, header: Sequence[str] | None = None) -> None:
        self.source = source
        self._header = header
        self._hub: Any = None
        path = Path(source.path)
        if not source.path or "\0" in source.path:
            raise UserError(f"no such file: {source.path!r} (expected a local file or a Hub data set id, owner/name)")
        # Of os.path, because pathlib raises where a name is too long for a file.
        self.local = os.path.isfile(path)
        is_id = not os.path.exists(path) and kind_of(path) not in SUFFIXES and HUB_ID.match(source.path)
        if not self.local and not is_id:
            raise UserError(f"no such file: {source.path} (expected a local file or a Hub data set id, owner/name)")
        if self.local and kind_of(path) not in SUFFIXES:
            raise unknown(f"file type of {path}", kind_of(path), SUFFIXES)

    def __iter__(self) -> Iterator[Row]:
        none = True
        for row in self._read():
            none = False
            yield row
        if none:
            raise UserError(f"{self.source.path} holds no rows")

    @property
    def is_csv(self) -> bool:
        """Whether this is a local csv file."""
        return self.local and kind_of(Path(self.source.path)) == ".csv"

    def first_cells(self) -> list[str]:
        """The first row of a csv file as it stands, names or not."""
        with _csv_rows(Path(self.source.path)) as rows:
            return next((cells for _, cells in rows if cells), [])

    @cached_property
    def columns(self) -> list[str]:
        """Every column that a row has, in the order of their first use; of a JSON file that takes a reading."""
        if self.is_csv:
            return [name for name in self._header or _header(Path(self.source.path), self.first_cells()) if name]
        if self.local and kind_of(Path(self.source.path)) == ".parquet":
            return next((list(row.cells) for row in self), [])
        if not self.local and (names := getattr(self._data, "column_names", None)):
            return list(names)
        return list(dict.fromkeys(name for row in self for name in row.cells))

    def require(self, column: str) -> str:
        """`column`, if a row has it; raises `UserError` naming the file and the closest column otherwise."""
        if column not in self.columns:
            raise no_column(self.source.path, column, self.columns)
        return column

    def first(self, names: Iterable[str]) -> str | None:
        """The first of `names` that is a column."""
        return next((name for name in names if name in self.columns), None)

    def require_one(self, names: Sequence[str]) -> str:
        """The first of `names` that is a column; `UserError` as `require` of the first where none is."""
        return self.first(names) or self.require(names[0])

    def _read(self) -> Iterator[Row]:
        path = Path(self.source.path)
        if not self.local:
            return (Row(dict(cells), f"{path}, row {i}") for i, cells in enumerate(self._data))
        readers = {".jsonl": _read_json_lines, ".json": _read_json, ".parquet": _read_parquet}
        reader = readers.get(kind_of(path))
        return reader(path) if reader else _read_csv(path, self._header)

    @property
    def _data(self) -> Any:
        if self._hub is None:
            self._hub = _hub(self.source)
        return self._hub


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


def _read_json_lines(path: Path) -> Iterator[Row]:
    for i, (line, row) in enumerate(read_json_lines(path)):
        yield Row(row, f"{path}, row {i} (line {line})")


def _read_json(path: Path) -> Iterator[Row]:
    if not is_list(path):
        data = parse_json(read_text(path), str(path))
        raise UserError(f"{path}: expected a list of objects, found {type(data).__name__}")
    for i, (line, cells) in enumerate(read_json_list(path)):
        if not isinstance(cells, dict):
            raise UserError(f"{path}, row {i} (line {line}): expected an object, found {type(cells).__name__}")
        yield Row(cells, f"{path}, row {i} (line {line})")


def _read_csv(path: Path, header: Sequence[str] | None) -> Iterator[Row]:
    number = 0
    with _csv_rows(path) as rows:
        for line, cells in rows:
            where = f"{path}, row {number} (line {line})"
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
            yield Row({name: cell for name, cell in zip(header, cells, strict=True) if name}, where)
            number += 1


@contextmanager
def _csv_rows(path: Path) -> Iterator[Iterator[tuple[int, list[str]]]]:
    """(line it begins in, cells) of every row. Raises `UserError` for a quote that is never closed or opened."""
    quotes = 0

    def lines() -> Iterator[str]:
        nonlocal quotes
        for text in file:
            quotes += text.count('"')
            yield text

    def rows() -> Iterator[tuple[int, list[str]]]:
        nonlocal quotes
        reader, number, line = csv.reader(lines(), strict=True), -1, 1
        while True:
            # The limit is the library's, not the reader's: it is set for this one row.
            before = csv.field_size_limit(_ANY_SIZE)
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{path}, row {max(number, 0)} (line {line}) cannot be read as csv: {error}; is a double quote "
                    "never closed?"
                ) from error
            finally:
                csv.field_size_limit(before)
            if cells is None:
                return
            # A quote that is lost may cut one row into two that look whole.
            if _stray(cells, quotes):
                raise UserError(
                    f"{path}, row {max(number, 0)} (line {line}): found a double quote in a cell that is not quoted; "
                    "a cell with one must stand in double quotes, with each of its own doubled"
                )
            quotes = 0
            yield line, cells
            number += bool(cells)
            line = reader.line_num + 1

    with open_text(path, newline="") as file, readable(path):
        yield rows()


def _stray(cells: Sequence[str], quotes: int) -> bool:
    """Whether a row of so many double quotes is not what a writer makes of its cells.

    Each quote of a cell is written twice, and two more stand around a cell that holds one, a comma or a line break.
    """
    around = quotes - 2 * sum(cell.count('"') for cell in cells)
    return around % 2 != 0 or around < 2 * sum(any(mark in cell for mark in '",\n\r') for cell in cells)


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = [name for name, n in Counter(names).items() if n > 1 and name]
    if twice:
        raise UserError(f"{path}: the first row names {len(twice)} columns twice; expected each name once")
    return names


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise UserError(f"{path}: two columns have one name; expected each name once")
            for batch in file.iter_batches(batch_size=1024):
                for cells in batch.to_pylist():
                    yield Row(cells, f"{path}, row {number}")
                    number += 1
    except UserError:
        raise
    # Arrow's own errors are ValueError, OSError, TypeError, KeyError or a bare one; a page may hold broken UTF-8.
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {_first_line(error)}") from error


def _hub(source: Source) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    # Some data sets keep their parts in folders and have no configurations.
    where = {"data_dir": source.hub_folder} if source.hub_folder else {}
    try:
        return load_dataset(source.path, source.hub_config, split=source.hub_split, revision=source.revision, **where)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source.path} is no local file, and the Hub gave no data set: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
