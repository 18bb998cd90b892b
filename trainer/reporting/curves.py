"""Safety against the footprint of an edit in memory: the chart of `routealign audit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from trainer.reporting import style

MODELS = {"base": style.BEFORE, "repaired": style.AFTER}
MARKS = ("o", "s", "^", "D", "v", "P")
FIGURES = {"harmful_refusal": "Harmful prompts refused", "benign_compliance": "Harmless prompts answered"}


def save_robustness(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A PNG of the rows of `robustness.json`."""
    with style.drawing():
        _drawn(rows).savefig(path, format="png", dpi=150, facecolor="white")


def robustness(rows: Sequence[Mapping[str, Any]], name: str = "robustness") -> str:
    """The rows of `robustness.json` as inline SVG."""
    with style.drawing():
        return style.svg(_drawn(rows), name, "Refusals and answers against the share of the parameters that is edited")


def _drawn(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A line for every model and kinds of units, with 95 % whiskers."""
    kinds = list(dict.fromkeys(" + ".join(row["kinds"]) for row in rows if row["kinds"]))
    marks = dict(zip(kinds, MARKS, strict=False))
    drawing, axes = style.canvas(9.0, 4.0, columns=len(FIGURES))
    for axis, (figure, title) in zip(axes, FIGURES.items(), strict=True):
        for model, colour in MODELS.items():
            nothing = [row for row in rows if row["model"] == model and not row["kinds"]]
            for name, mark in marks.items():
                line = [row for row in rows if row["model"] == model and " + ".join(row["kinds"]) == name]
                line = sorted([*nothing, *line], key=lambda row: float(row["parameters"]))
                x = [float(row["parameters"]) for row in line]
                y = [float(row[figure]["rate"]) for row in line]
                ends = [row[figure]["ci95"] for row in line]
                whiskers = [
                    [max(0.0, rate - end[0]) for rate, end in zip(y, ends, strict=True)],
                    [max(0.0, end[1] - rate) for rate, end in zip(y, ends, strict=True)],
                ]
                axis.errorbar(x, y, whiskers, color=colour, marker=mark, markersize=4, linewidth=1, elinewidth=0.6)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("parameters edited")
        axis.set_ylim(-0.03, 1.03)
        axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axis.grid(axis="y", alpha=0.4)
    keys = [Line2D([], [], color=colour) for colour in MODELS.values()]
    keys += [Line2D([], [], color=style.INK, marker=mark, linestyle="none") for mark in marks.values()]
    style.legend(drawing, keys, [*MODELS, *marks])
    return drawing
