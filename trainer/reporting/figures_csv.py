"""`figures.csv` beside the report: every figure of its table as numbers, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from trainer.reporting.figures import Figure

SIDES = ("before", "after")
OF_A_RATE = ("rate", "low", "high", "n", "unjudged")


def text(figures: Sequence[Figure]) -> str:
    """A line a figure: key, wording, each side's rate with its 95 % interval and counts, the change, each control.

    Rates and changes are shares; empty where a figure was not measured.
    """
    controls = list(dict.fromkeys(name for figure in figures for name in figure.controls))
    sides = [*SIDES, *(name.lower().replace(" ", "_") for name in controls)]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    columns = [f"{side}_{part}" for side in sides for part in OF_A_RATE]
    writer.writerow(["figure", "label", *columns, "change", "change_low", "change_high", "trend"])
    for figure in figures:
        rates = [figure.before, figure.after, *(figure.controls.get(name) for name in controls)]
        change = figure.paired["ci95"] if figure.paired else ["", ""]
        cells = [cell for rate in rates for cell in _cells(rate)]
        moved = "" if figure.change is None else figure.change
        writer.writerow([figure.key, figure.label, *cells, moved, *change, figure.trend])
    return written.getvalue()


def _cells(rate: dict[str, Any] | None) -> list[Any]:
    if rate is None:
        return [""] * len(OF_A_RATE)
    return [rate["rate"], *rate["ci95"], rate["n"], rate.get("unjudged") or 0]
