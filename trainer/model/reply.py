"""A reply: what a model wrote, as the tokens it wrote, or a text that somebody else gave for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reply:
    """`text`: without special tokens and outer spaces. `ids`: the generated tokens up to and with the one that ended
    the turn, without padding; None for a text that no model generated here (a fixed sentence, a data set's answer).
    `finished`: the model ended its turn; False where the length limit cut it.
    """

    text: str
    ids: tuple[int, ...] | None
    finished: bool

    @classmethod
    def written(cls, text: str) -> Reply:
        """A whole reply given as text."""
        return cls(text, None, True)
