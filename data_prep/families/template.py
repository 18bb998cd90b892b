"""What a family, or a file of templates, is made of: turns around a goal."""

from dataclasses import dataclass

from ..schema import Turn

GOAL = "[INSERT PROMPT HERE]"
"""Stands for the goal in a template, as in published files of templates."""


@dataclass(frozen=True)
class Template:
    """`text`: the last turn of the user. `before`: the turns that come first. `opening`: how the assistant's answer is
    made to begin. `encoding`: how the goal is written (`encodings.ENCODINGS`).
    """

    text: str
    before: tuple[Turn, ...] = ()
    opening: str = ""
    encoding: str = "plain"


def talk(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
    """Turns of the user and the assistant, in pairs."""
    return tuple(turn for asked, said in pairs for turn in (Turn("user", asked), Turn("assistant", said)))
