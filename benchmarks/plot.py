"""Time and memory of every way as bars, with the floor as a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the plot of a result of `python -m benchmarks`."""
    rows = found["rows"]
    names = [row["name"].replace("_", " ") for row in rows]
    kinds = [("seconds", f"seconds a step ({found['clock']})"), ("peak_mb", "peak memory, MB")]
    kinds = [(key, label) for key, label in kinds if all(row[key] is not None for row in rows)]
    figure = Figure(figsize=(5.5 * len(kinds), 0.36 * len(rows) + 1.4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        colours = ["#2c6e9b" if "split" in row["name"] else "#b9c4cc" for row in rows]
        bars = axes.barh(names, [row[key] for row in rows], color=colours)
        axes.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.2f}", padding=3)
        axes.axvline(next(row[key] for row in rows if row["name"] == "floor"), color="#444444", linewidth=0.8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found['setting']}; {found['tokens']:,} tokens a step; {found['device']}", fontsize=10)
    figure.savefig(path, dpi=110)
