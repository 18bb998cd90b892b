"""The table of supported backbones, made from what the tests found: `python -m tests.moe.backbone_table`.

`tests/moe/test_families.py` writes its results to `.cache/backbones.json` (ROUTEALIGN_BACKBONES names another file).
This script turns them into Markdown between the markers in the pages below. A test compares the pages with the results
of its own run, so that the table cannot be out of date.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.moe.families import FAMILIES, LLAMA4

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "docs" / "backbones.md", ROOT / "README.md")
START, END = "<!-- backbones:start -->", "<!-- backbones:end -->"
CHECKS = ("record", "pin", "full", "LoRA", "repair", "consistency", "reload")
MODEL_TYPES = (*(family.model_type for family in FAMILIES), LLAMA4)


def results_file() -> Path:
    return Path(os.environ.get("ROUTEALIGN_BACKBONES", ROOT / ".cache" / "backbones.json"))


def header() -> list[str]:
    columns = ["model type", "MoE layers tested", "scoring family", "shared expert", *CHECKS]
    return [_row(columns), _row(["---"] * len(columns))]


def row(model_type: str, result: dict[str, Any]) -> str:
    """One line of the table; a check that did not pass is `no`."""
    if "refused" in result:
        return _row([f"`{model_type}`", "refused", result["refused"], *[""] * (len(CHECKS) + 1)])
    trains = ", can train" if result.get("shared trains") else ""
    shared = f"`{result['shared']}`{trains}" if result["shared"] else "none"
    passed = ["yes" if result.get(check) else "no" for check in CHECKS]
    return _row([f"`{model_type}`", result["layers"], result["scoring"], shared, *passed])


def table(results: dict[str, dict[str, Any]]) -> str:
    """The whole table, families in the order of the tests; each needs results."""
    return "\n".join([*header(), *(row(name, results[name]) for name in MODEL_TYPES)])


def between_markers(text: str) -> str | None:
    """What stands between the markers of a page, or None without them."""
    if START not in text:
        return None
    return text.split(START)[1].split(END)[0].strip()


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    if not results_file().is_file():
        print(f"{results_file()} not found: run pytest tests/moe/test_families.py first", file=sys.stderr)
        return 2
    results = json.loads(results_file().read_text())
    if missing := [name for name in MODEL_TYPES if not {"layers", "refused"} & results.get(name, {}).keys()]:
        print(f"{results_file()}: no results for {', '.join(missing)}; run the whole test file", file=sys.stderr)
        return 2
    for page in PAGES:
        text = page.read_text()
        if between_markers(text) is None:
            print(f"{page.name}: no markers, left alone")
            continue
        before, after = text.split(START)[0], text.split(END)[1]
        page.write_text(f"{before}{START}\n{table(results)}\n{END}{after}")
        print(f"{page.name}: {len(MODEL_TYPES)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
