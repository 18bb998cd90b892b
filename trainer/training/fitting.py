"""Which rows a stage trains on, and a table of what became of every row, by source: nothing is left out silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.model.chat import Chat, ChatTurn
from trainer.model.reply import Reply
from trainer.runtime.console import table

NO_ROOM, CUT_TARGET = "prompt as long as max_length", "refusal cut by max_length"
REFUSED, UNJUDGED, ABSENT = "answered with a refusal", "answer not judged", "nothing of the kind in the data"
REMEDIES = {
    NO_ROOM: "raise {section}.max_length",
    CUT_TARGET: "raise {section}.max_length",
    REFUSED: "give other data, or set the kind's weight in section repair to 0",
    UNJUDGED: "raise detect.max_new_tokens, or set the kind's weight in section repair to 0",
    ABSENT: "give data of the kind, or set its weight in section repair to 0",
}
LeftOut = Mapping[tuple[str, str], int]
"""(source, reason) -> rows that were left out before the stage saw them."""


@dataclass
class Source:
    """Rows of one source. Of those kept, `cut` lost their reply's end to `max_length`, and the reply of `unfinished`
    was cut when it was generated; neither trains an end of the turn. `dropped`: reason -> rows."""

    kept: int = 0
    cut: int = 0
    unfinished: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def asked(self) -> int:
        return self.kept + self.dropped.total()


class RowTable:
    """What became of a stage's rows, by source."""

    def __init__(self, stage: str, left_out: LeftOut | None = None, section: str = "repair"):
        self.stage, self.section, self.sources = stage, section, dict[str, Source]()
        for (source, reason), rows in (left_out or {}).items():
            self._of(source).dropped[reason] += rows

    def keep(self, source: str, *replies: Reply, cut: bool = False) -> None:
        found = self._of(source)
        found.kept += 1
        found.cut += cut
        found.unfinished += not all(reply.finished for reply in replies)

    def drop(self, source: str, reason: str) -> None:
        self._of(source).dropped[reason] += 1

    def _of(self, source: str) -> Source:
        return self.sources.setdefault(source, Source())

    def check(self) -> None:
        """Stop where a kind of rows that there was is gone altogether.

        Raises:
            UserError: names the kind, the counts, the reasons and what to change.
        """
        gone = [(name, source) for name, source in self.sources.items() if source.kept == 0]
        gone = [(name, source) for name, source in gone if source.dropped.keys() - {ABSENT}]
        if not gone:
            return
        name, source = gone[0]
        reasons = ", ".join(f"{rows} {reason}" for reason, rows in source.dropped.most_common())
        remedy = "; ".join(dict.fromkeys(REMEDIES[reason] for reason, _ in source.dropped.most_common())).format(
            section=self.section
        )
        raise UserError(f"{self.stage}: none of {source.asked} rows '{name}' is left ({reasons}); {remedy}")

    def json(self) -> dict[str, Any]:
        """Source -> counts, plain values."""
        return {name: {**asdict(source), "dropped": dict(source.dropped)} for name, source in self.sources.items()}

    def show(self) -> None:
        """On the console."""
        rows = [
            [name, found.kept, found.cut, found.unfinished, _words(found.dropped)]
            for name, found in self.sources.items()
        ]
        columns = ["source", "kept", "of these cut by max_length", "reply unfinished", "dropped"]
        table(f"{self.stage}: rows", columns, rows)


def _words(dropped: Counter[str]) -> str:
    return ", ".join(f"{rows} ({reason})" for reason, rows in dropped.most_common()) or "0"


def turn_of(chat: Chat, prompt: Conversation, reply: Reply) -> ChatTurn:
    """A prompt and its reply as tokens: the very tokens that the model wrote, where it wrote them.

    Raises:
        RuntimeError: the response is another one (an end token behind a cut reply, say).
    """
    turn = chat.encode(prompt, reply)
    if reply.ids is not None and tuple(turn.ids[turn.prompt :]) != reply.ids:
        raise RuntimeError(
            f"a response of {len(turn.ids) - turn.prompt} tokens would be trained where the model wrote "
            f"{len(reply.ids)} others; the chat template or the encoding changes replies"
        )
    return turn
