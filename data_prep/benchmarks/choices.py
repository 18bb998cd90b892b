"""A question with options, asked so that the answer is one letter."""

from collections.abc import Sequence

from ..schema import Conversation
from ..usable import Loaded

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASKED = "Answer with the letter of the right option."


def lettered(question: str, options: Sequence[str], right: int) -> Loaded:
    """The question over its options in the order given; the answer is the letter of `options[right]`."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return Loaded(Conversation.of(f"{question}\n\n{listed}\n\n{ASKED}"), LETTERS[right])
