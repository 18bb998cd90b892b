"""When two texts are the same text: what may differ between them, and what may not."""

import re
import unicodedata
from functools import lru_cache

from .schema import Conversation

# Between digits these are part of what is asked: 2-2 and 2*2, 1.5 and 15. Elsewhere they are punctuation.
_IN_A_NUMBER = re.compile(r"((?<=\d) *[-*/%] *(?=\d)|(?<=\d)[.,:](?=\d)|(?<![^\s(])-(?=\d))")


def normalised(text: str) -> str:
    """The text as compared between train and test, sources and templates.

    Case, punctuation, spaces, invisible characters and the Unicode form (full-width letters, composed accents) make no
    difference. Letters, digits, vowel signs and other marks, emoji and symbols do, and operators between digits.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # Odd pieces are the operators between digits.
    pieces = enumerate(_IN_A_NUMBER.split(folded))
    kept = "".join(piece.strip() if i % 2 else "".join(map(_kept, piece)) for i, piece in pieces)
    # A text of punctuation alone is itself.
    return " ".join(kept.split()) or text.strip()


def compared(conversation: Conversation) -> tuple[tuple[str, str], ...]:
    """A conversation as compared: speaker and text of every turn, and how the answer is made to begin."""
    turns = tuple((turn.role, normalised(turn.text)) for turn in conversation.turns)
    return (*turns, ("opening", normalised(conversation.opening))) if conversation.opening else turns


@lru_cache(maxsize=65536)
def _kept(char: str) -> str:
    if "\ufe00" <= char <= "\ufe0f":  # chooses between two pictures of one emoji
        return ""
    category = unicodedata.category(char)
    if category == "Cf":
        return ""
    return char if category[0] in "LNMS" or category in ("Co", "Cn") else " "
