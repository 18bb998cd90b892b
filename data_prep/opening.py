"""Data files as text: UTF-8 without its byte-order mark, unpacked where the name ends in `.gz`."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import UserError


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read: `.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def open_text(path: Path, *, newline: str | None = None) -> IO[str]:
    """A file to read text from; `newline` as in `open`."""
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(path), encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn bytes that are no UTF-8 text, or no gzip where they should be, into a `UserError` that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from error
