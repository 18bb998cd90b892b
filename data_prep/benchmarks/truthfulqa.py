"""TruthfulQA (github.com/sylinrl/TruthfulQA; Hub truthfulqa/truthful_qa): questions that invite a false answer.

On the Hub: `hub_config: generation` for `read`, `multiple_choice` for `read_choices`, `hub_split: validation`.
"""

import random
from collections.abc import Iterator

from ..cells import text_of
from ..errors import UserError
from ..tables import Row, Table
from ..usable import NO_TEXT, Rows, prompts
from .choices import LETTERS, lettered

QUESTION = ("Question", "question")
BEST = ("Best Answer", "best_answer")


def read(table: Table) -> Rows:
    """Free form: the question and its best answer."""
    column = table.source.column
    return prompts(table, table.require(column) if column else table.require_one(QUESTION), table.first(BEST))


def read_choices(table: Table) -> Rows:
    """Multiple choice with one right option (MC1). The file lists that one first, so options are shuffled, each
    question's by a seed of its own."""
    question = table.require_one(("question", "Question"))
    table.require("mc1_targets")
    for row in table:
        text = text_of(row, question)
        if not text:
            yield NO_TEXT
            continue
        options = list(_options(row))
        right = [option for option, is_right in options if is_right]
        if len(right) != 1 or not 2 <= len(options) <= len(LETTERS):
            raise UserError(
                f"{row.where}, column 'mc1_targets': expected 2 to {len(LETTERS)} options, one of them right"
            )
        random.Random(f"mc1:{text}").shuffle(options)
        texts = [option for option, _ in options]
        yield lettered(text, texts, texts.index(right[0]))


def _options(row: Row) -> Iterator[tuple[str, bool]]:
    """(option, whether it is right): {option: 0 or 1} in the repository, lists `choices` and `labels` on the Hub."""
    where, found = f"{row.where}, column 'mc1_targets'", row.cells.get("mc1_targets")
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected an object of options with 0 or 1")
    choices, labels = found.get("choices"), found.get("labels")
    if isinstance(choices, list) and isinstance(labels, list):
        if len(choices) != len(labels):
            raise UserError(f"{where}: found {len(choices)} choices and {len(labels)} labels")
        pairs = list(zip(choices, labels, strict=True))
    else:
        pairs = list(found.items())
    for option, label in pairs:
        if label not in (0, 1):
            raise UserError(f"{where}: unknown label; allowed: 0, 1")
        yield text_of(Row({"mc1_targets": option}, row.where), "mc1_targets"), bool(label)
