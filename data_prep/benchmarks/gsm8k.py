"""GSM8K (github.com/openai/grade-school-math; Hub openai/gsm8k, `hub_config: main`): sums told as stories."""

import re
from collections.abc import Iterator

from ..cells import text_of
from ..errors import UserError
from ..tables import Row, Table
from ..usable import Rows, prompts

ANNOTATION = re.compile(r"<<[^<>]*>>")
RESULT = "####"


def read(table: Table) -> Rows:
    """Question and answer: the rationale without the annotations of a calculator, then `#### ` and the result."""
    column = table.require(table.source.column or "question")
    table.require("answer")
    return prompts(_cleaned(table), column, "answer")


def _cleaned(table: Table) -> Iterator[Row]:
    for row in table:
        answer = ANNOTATION.sub("", text_of(row, "answer"))
        if RESULT not in answer:
            raise UserError(f"{row.where}, column 'answer': found no result behind '{RESULT}'")
        yield Row(row.cells | {"answer": answer}, row.where)
