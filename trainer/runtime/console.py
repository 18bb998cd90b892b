"""What a person sees while something runs: progress bars, lines and tables, from the main process only.

Results (`say`, `table`) go to standard output and progress to standard error, so that output can be piped.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar, overload

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")

# Off a terminal, a long loop says this often how far it is, so that the log of a cluster job is worth reading.
SECONDS_BETWEEN_LINES = 60.0

# Wide enough for any table of ours; tables take only the width of their content.
_LOG_WIDTH = 2000

# What a terminal acts upon instead of showing it: control characters, and those that turn the direction of text.
_ACTED_UPON = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)

# The display now on screen. Nested loops add a row to it: two live displays would overwrite each other.
_display: Progress | None = None


def printable(text: str) -> str:
    """The text with every character that a terminal would act upon written out; tabs and line ends stay.

    What is shown may come from others: a file's name, a key of a patch, a model's reply.
    """
    return _ACTED_UPON.sub(lambda found: ascii(found.group())[1:-1], text)


def is_main_process() -> bool:
    """Whether this process speaks: global rank 0, or local rank 0 where only that is known, or no launcher at all."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


@overload
def progress(items: int, label: str, total: int | None = None) -> Iterator[int]: ...
@overload
def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]: ...
def progress(items: int | Iterable[T], label: str, total: int | None = None) -> Iterator[int] | Iterator[T]:
    """Yield from `items` (an int means `range(items)`) while showing how far the loop is.

    A terminal gets a bar with the time left; anything else gets a line at the start, one a minute and one at the end.
    `total` is needed for the time left only where `items` has no length.
    """
    if isinstance(items, int):
        return _shown(range(items), label, items)
    return _shown(items, label, len(items) if total is None and isinstance(items, Sized) else total)


def _shown(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    if not is_main_process():
        yield from items
        return
    console = Console(stderr=True)
    shown = _with_bar if console.is_terminal else _with_lines
    yield from shown(items, label, total, console)


def _with_bar(items: Iterable[T], label: str, total: int | None, console: Console) -> Iterator[T]:
    global _display
    owner = _display is None
    if _display is None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        _display = Progress(*columns, TimeRemainingColumn(), console=console)
        _display.start()
    display = _display
    task = display.add_task(_literal(label), total=total)
    try:
        for item in items:
            yield item
            display.advance(task)
    finally:
        if owner:
            display.stop()
            _display = None
        else:
            display.remove_task(task)


def _with_lines(items: Iterable[T], label: str, total: int | None, console: Console) -> Iterator[T]:
    started, done = time.monotonic(), 0
    told = started
    _line(console, f"{label} ..." if total is None else f"{label}: {total} ...")
    for item in items:
        yield item
        done += 1
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            _line(console, f"{label}: {done}{'' if total is None else f' of {total}'} after {told - started:.0f} s")
    _line(console, f"{label}: {done} done in {time.monotonic() - started:.1f} s")


def _line(console: Console, text: str) -> None:
    # soft_wrap: a log file must keep one message on one line, whatever width rich assumes.
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _literal(text: str) -> str:
    return escape(printable(text))


def say(line: str) -> None:
    """Print one line for the user. The text is taken literally: no markup, no control characters."""
    if is_main_process():
        _line(_display.console if _display else Console(), line)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a titled table; cells are shown with `str` and taken literally. `ValueError` where a row's length differs.

    Off a terminal the table is as wide as its content, so that a log never cuts a figure.
    """
    built = Table(title=_literal(title), title_justify="left")
    for index, name in enumerate(columns):
        built.add_column(_literal(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"table '{title}': a row has {len(row)} cells, the header has {len(columns)}")
        built.add_row(*(_literal(str(cell)) for cell in row))
    if is_main_process():
        console = _display.console if _display else Console()
        (console if console.is_terminal else Console(width=_LOG_WIDTH)).print(built)
