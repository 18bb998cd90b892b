"""The usable rows of a table: prompts with their answers, in the file's order, and why the other rows are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import overload

from .cells import asked_in, text_of, texts_of
from .errors import UserError
from .schema import Conversation
from .tables import Row

NO_TEXT = "no text"
OTHER_SIDE = "the other label"


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


Rows = Iterator[Loaded | str]
"""A usable row, or the reason why a row is left out."""


def prompts(rows: Iterable[Row], column: str, answers: str | None = None, wrong: str | None = None) -> Rows:
    """The prompt of `column`, a text or messages, with the text of the column `answers`, and the texts of `wrong`.

    `UserError` as `asked_in`.
    """
    for row in rows:
        asked, answer = asked_in(row, column), text_of(row, answers) if answers else ""
        if asked is None:
            yield NO_TEXT
            continue
        if answer and asked.answer and answer != asked.answer:
            raise UserError(f"{row.where}: column {answers!r} and the last turn give two answers; expected one")
        yield Loaded(asked.conversation, answer or asked.answer, texts_of(row, wrong) if wrong else ())


class Usable(Sequence[Loaded]):
    """The usable rows of a file, in its order; `dropped` counts the others by reason.

    Rows are read from the file whenever they are asked for and not kept, so that a file of any size can be drawn from.
    Making one reads the file once, so that a malformed row is found before anything is drawn.
    """

    def __init__(self, read: Callable[[], Rows]) -> None:
        self._read = read
        self.dropped: Counter[str] = Counter()
        self._n = 0
        for row in read():
            if isinstance(row, str):
                self.dropped[row] += 1
            else:
                self._n += 1

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Loaded]:
        return (row for row in self._read() if not isinstance(row, str))

    def pick(self, places: Sequence[int]) -> list[tuple[int, Loaded]]:
        """(place, row) of these places, in their order; the file is read once."""
        wanted = set(places)
        last = max(wanted, default=-1)
        found = {i: row for i, row in enumerate(islice(self, last + 1)) if i in wanted}
        return [(i, found[i]) for i in places]

    @overload
    def __getitem__(self, place: int) -> Loaded: ...
    @overload
    def __getitem__(self, place: slice) -> list[Loaded]: ...
    def __getitem__(self, place: int | slice) -> Loaded | list[Loaded]:
        chosen = range(self._n)[place]
        if isinstance(chosen, int):
            return self.pick([chosen])[0][1]
        return [row for _, row in self.pick(chosen)]
