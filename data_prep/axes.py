"""The prompts of a run's axes, each with the answer that is right there; no text stands in training and in test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .config import AxisSource
from .errors import UserError
from .leaks import count_once, keep_tests_unseen
from .leaks import notes as notes_of
from .schema import Prompt, RowCount
from .sources import Part, source_part


@dataclass(frozen=True)
class AxisRows:
    """Prompts of one axis. Every training prompt has an answer, and every test prompt that is judged by one."""

    name: str
    train: list[Prompt]
    test: list[Prompt]


@dataclass(frozen=True)
class Axes:
    """The axes in the recipe's order; `notes` and `rows` as in `Corpus`."""

    axes: list[AxisRows]
    notes: list[str]
    rows: list[RowCount]


def load_axes(
    sources: Mapping[str, AxisSource], needs_answer: Mapping[str, bool], tested: Sequence[Prompt], seed: int
) -> Axes:
    """The rows of every axis, by name.

    Training rows whose text is a test row of any axis, or one of `tested` (what else a run measures), are dropped.

    Raises:
        UserError: an axis without training or test rows, a file that cannot be read, a row without an answer.
    """
    parts = []
    for number, (name, source) in enumerate(sources.items()):
        key = f"axes.{number}.data"
        for name_of_key in ("wrong", "only"):
            if getattr(source, name_of_key) and source.format != "records":
                raise UserError(f"{key}.{name_of_key}: read with format records alone, found {source.format!r}")
        if source.train == 0:
            raise UserError(f"{key}.train: found 0; allowed: 1 or more rows as a count or a slice: an axis is trained")
        part = source_part("capability", source, seed, key)
        for side, rows in (("train", part.train), ("test", part.test if needs_answer[name] else [])):
            missing = next((prompt for prompt in rows if not (prompt.answer or "").strip()), None)
            if missing is not None:
                raise UserError(f"{key}.{side}: row {missing.id} has no answer; an axis needs one for every prompt")
        parts.append(part)
    for part in parts:
        count_once(part)
    others = Part("data", "capability", 0, [], list(tested))
    keep_tests_unseen([*parts, others])
    return Axes(
        [AxisRows(name, part.train, part.test) for name, part in zip(sources, parts, strict=True)],
        [note for part in parts for note in notes_of(part)],
        [part.count() for part in parts],
    )
