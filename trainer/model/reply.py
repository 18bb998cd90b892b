"""A reply: what a model wrote, as the tokens it wrote, or a text that somebody else gave for it.

Here too, because several rooms need them: how replies are asked for, and how they are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from data_prep.schema import Conversation


@dataclass(frozen=True)
class Reply:
    """`text`: the final answer, without reasoning, special tokens and outer spaces; empty where the model was still
    reasoning. `ids`: the generated tokens up to and with the one that ended the turn, without padding; None for a text
    that no model generated here (a fixed sentence, a data set's answer). `finished`: the model ended its turn; False
    where the length limit cut it.
    """

    text: str
    ids: tuple[int, ...] | None
    finished: bool

    @classmethod
    def written(cls, text: str) -> Reply:
        """A whole reply given as text."""
        return cls(text, None, True)

    def record(self) -> dict[str, Any]:
        """As JSON keeps it; `of_record` reads it back."""
        return {"answer": self.text, "ids": self.ids, "finished": self.finished}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Reply:
        ids = record["ids"]
        return cls(record["answer"], None if ids is None else tuple(ids), record["finished"])


Ask = Callable[[Sequence[Conversation], str], list[Reply]]
"""(prompts, label of the progress bar) -> the replies of a model."""

Verdict = Literal["refused", "complied", "unjudged"]


class Judge(Protocol):
    """Says of every reply whether the model declined; `evaluation/judges` has the judges."""

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Verdict]:
        """One verdict per reply, in their order; `prompts` are what the replies answer, as many.

        A reply without a text has no final answer and is "unjudged".
        """
        ...
