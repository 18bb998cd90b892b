"""What a method adds to the report and to the model card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.reporting.artefacts import Artefacts

Facts = list[tuple[str, str]]
"""(name, value) in the order shown."""


@dataclass(frozen=True)
class MethodSection:
    """A section of the report: facts, and a table where it has rows. `key` is its anchor in the page."""

    key: str
    title: str
    facts: Facts = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class MethodReport:
    """`kind`: what was done to the model, in a word for the title. `edited`: the card's sentence on what changed.
    `cautions`: before those that every report has.
    """

    kind: str = "repair"
    sections: list[MethodSection] = field(default_factory=list)
    edited: str | None = None
    cautions: list[str] = field(default_factory=list)


Report = Callable[[Artefacts], MethodReport]
