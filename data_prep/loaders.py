"""The rows of a file as prompts: one function per format, behind the table `FORMATS`.

A loader gets the path of a local file (or a Hub data set id) and gives prompts in the file's order, filtered.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .cells import asked_in, text_of, texts_of
from .errors import UserError, unknown
from .schema import Conversation
from .tables import Row, Source, columns, no_column, read_rows

__all__ = ["FORMATS", "Loaded", "Source", "Usable", "load"]

PROMPT_COLUMNS = (
    "prompt", "text", "goal", "Goal", "instruction", "question", "Behavior", "forbidden_prompt", "messages",
    "conversations", "conversation",
)  # fmt: skip
ANSWER_COLUMNS = ("answer", "output")
NO_TEXT = "no text"
OTHER_SIDE = "the other label"
OTHER_VALUE = "another value in a column of `only`"


@dataclass(frozen=True)
class Loaded:
    """One usable row: the prompt and, where the file has them, its answer and answers that are not right."""

    conversation: Conversation
    answer: str | None = None
    wrong: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.conversation.text


class Usable(list[Loaded]):
    """The usable rows of a file, in its order; `dropped` counts the others by reason."""

    def __init__(self, rows: Iterable[Loaded] = (), dropped: Counter[str] | None = None) -> None:
        super().__init__(rows)
        self.dropped = dropped if dropped is not None else Counter()


def require(source: Source, rows: list[Row], column: str) -> str:
    """`column`, if a row has it; raises `UserError` naming the file and the closest column otherwise."""
    found = columns(rows)
    if column not in found:
        raise no_column(source.path, column, found)
    return column


def _usable(rows: Iterable[Row], column: str, answers: str | None = None, wrong: str | None = None) -> Usable:
    usable = Usable()
    for row in rows:
        asked, answer = asked_in(row, column), text_of(row, answers) if answers else ""
        if asked is None:
            usable.dropped[NO_TEXT] += 1
            continue
        if answer and asked.answer and answer != asked.answer:
            raise UserError(f"{row.where}: column {answers!r} and the last turn give two answers; expected one")
        usable.append(Loaded(asked.conversation, answer or asked.answer, texts_of(row, wrong) if wrong else ()))
    return usable


def _first(rows: list[Row], names: Iterable[str]) -> str | None:
    found = columns(rows)
    return next((name for name in names if name in found), None)


def load_records(source: Source) -> Usable:
    """Any table: `source.column`, or the first known prompt column; the answer column is optional.

    Of a table that holds several kinds of rows, those with the values of `source.only` alone.
    """
    rows = read_rows(source)
    column = source.column or _first(rows, PROMPT_COLUMNS) or PROMPT_COLUMNS[0]
    answers = require(source, rows, source.answer) if source.answer else None
    answers = answers or _first(rows, (n for n in ANSWER_COLUMNS if n != column))
    wanted = [row for row in rows if all(row.cells.get(name) == value for name, value in source.only.items())]
    for name in source.only:
        require(source, rows, name)
    wrong = require(source, rows, source.wrong) if source.wrong else None
    usable = _usable(wanted, require(source, rows, column), answers, wrong)
    usable.dropped[OTHER_VALUE] += len(rows) - len(wanted)
    return usable


def load_advbench(source: Source) -> Usable:
    """AdvBench: the `goal` column. Its `target` is the attack's own string and never read."""
    rows = read_rows(source)
    return _usable(rows, require(source, rows, source.column or "goal"))


def load_xstest(source: Source) -> Usable:
    """XSTest: rows labelled `safe`, or those labelled `unsafe` when the source is used as harmful goals."""
    rows = read_rows(source)
    column, label = require(source, rows, source.column or "prompt"), require(source, rows, "label")
    wanted = "unsafe" if source.kind == "harmful" else "safe"
    labels = [text_of(row, label) for row in rows]
    for row, found in zip(rows, labels, strict=True):
        if found not in ("safe", "unsafe"):
            raise UserError(f"{row.where}, column 'label': unknown label; allowed: safe, unsafe")
    usable = _usable((row for row, found in zip(rows, labels, strict=True) if found == wanted), column)
    usable.dropped[OTHER_SIDE] += sum(found != wanted for found in labels)
    return usable


def load_alpaca(source: Source) -> Usable:
    """Alpaca: `instruction`, a blank line, and `input` where it is not empty; `output` is the answer."""
    rows = read_rows(source)
    require(source, rows, "instruction")
    joined = []
    for row in rows:
        text = "\n\n".join(filter(None, (text_of(row, "instruction"), text_of(row, "input"))))
        joined.append(Row(row.cells | {"instruction": text}, row.where))
    return _usable(joined, "instruction", _first(rows, ["output"]))


def load_qa(source: Source) -> Usable:
    """Question and answer columns; both are needed."""
    rows = read_rows(source)
    return _usable(rows, require(source, rows, source.column or "question"), require(source, rows, "answer"))


FORMATS: dict[str, Callable[[Source], Usable]] = {
    "records": load_records,
    "advbench": load_advbench,
    "xstest": load_xstest,
    "alpaca": load_alpaca,
    "qa": load_qa,
}


def load(format: str, source: Source) -> Usable:
    """The usable rows of `source`; raises `UserError` for an unknown format or when filtering leaves none."""
    if format not in FORMATS:
        raise unknown("data format", format, FORMATS)
    rows = FORMATS[format](source)
    if not rows:
        raise UserError(f"{source.path} holds no usable rows as format {format!r} for {source.kind} prompts")
    return rows
