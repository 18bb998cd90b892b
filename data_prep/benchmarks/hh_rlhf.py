"""hh-rlhf (github.com/anthropics/hh-rlhf; Hub Anthropic/hh-rlhf): pairs of dialogues, one reply chosen, one rejected.

On the Hub the parts are folders: `hub_folder: harmless-base`.
"""

import re

from ..cells import text_of
from ..errors import UserError
from ..schema import Conversation, Turn
from ..tables import Table
from ..usable import NO_TEXT, Loaded, Rows

SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def read(table: Table) -> Rows:
    """The chosen dialogue up to the last question, and the chosen reply as its answer.

    Turns of one speaker that follow each other are one turn. The rejected reply is not read.
    """
    column = table.require(table.source.column or "chosen")
    for row in table:
        text = text_of(row, column)
        turns = _turns(text, f"{row.where}, column {column!r}") if text else []
        answer = turns.pop().text if turns and turns[-1].role == "assistant" else ""
        if not turns or not all(turn.text for turn in turns):
            yield NO_TEXT
        else:
            yield Loaded(Conversation(tuple(turns)), answer or None)


def _turns(text: str, where: str) -> list[Turn]:
    before, *parts = SPEAKER.split(text)
    if before.strip() or not parts or parts[0] != "Human":
        raise UserError(f"{where}: expected a dialogue that begins with 'Human:'")
    turns: list[Turn] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1].role == role:
            turns[-1] = Turn(turns[-1].role, f"{turns[-1].text}\n\n{said.strip()}".strip())
        else:
            turns.append(Turn("user" if role == "user" else "assistant", said.strip()))
    return turns
