"""Every sentence of the README that compares methods on real text is held against a table of the repository.

`claims.json`: `says` stands word for word on its page; each of `cells` (row, column, value, its wording where another)
is in the sentence and in the table; `holds` are relations between cells; `points` are cells in hundredths.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLAIMS: list[dict[str, Any]] = json.loads((ROOT / "tests/claims.json").read_text(encoding="utf-8"))


def flat(text: str) -> str:
    return " ".join(text.split())


class Table:
    """The first table of a page whose columns hold those asked for; a row is named by how it begins."""

    def __init__(self, page: str):
        lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        self.rows = [
            [cell.strip().replace("**", "").replace("`", "") for cell in line[1:].split("|")] for line in lines
        ]

    def cell(self, row: str, column: str) -> str:
        (head,) = [cells for cells in self.rows if cells[0] == "run" and column in cells]
        found = [cells for cells in self.rows if cells[0].startswith(row)]
        assert len(found) == 1, f"{row!r} names {len(found)} rows"
        return found[0][head.index(column)]

    def number(self, row: str, column: str) -> float:
        return float(self.cell(row, column).rstrip("%"))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["says"][:40])
def test_a_claim_stands_on_its_page_and_in_its_table(claim: dict[str, Any]) -> None:
    assert claim["says"] in flat((ROOT / claim["page"]).read_text(encoding="utf-8"))
    table = Table(claim["table"])
    for row, column, value, *wording in claim["cells"]:
        assert (wording[0] if wording else value) in claim["says"]
        held = table.cell(row, column)
        if re.fullmatch(r"[\d.]+", value):
            decimals = len(value.partition(".")[2])
            assert round(float(held.rstrip("%")), decimals) == float(value), (row, column, held)
        else:
            assert held == value, (row, column)
    for row, column, sign, other, its in claim.get("holds", []):
        assert sign == "<" and table.number(row, column) < table.number(other, its), (row, column, other)
    for row, column, points in claim.get("points", []):
        assert str(points) in claim["says"] and round(100 * table.number(row, column)) == points, (row, column)


def test_no_figure_of_the_readmes_real_text_is_without_a_claim() -> None:
    text = flat((ROOT / "README.md").read_text(encoding="utf-8"))
    start = text.index("On a real-text checkpoint")
    paragraph = text[start : text.index("[The whole table]", start)]
    for claim in CLAIMS:
        paragraph = paragraph.replace(claim["says"], "")
    left = re.findall(r"(?<![\w.])\.\d+|\d+\.\d+", paragraph)
    # The size of the model, and lengths of replies, which stand beside the table.
    assert left == ["15.6", "28.0", "27.4"]
