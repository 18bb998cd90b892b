"""The charts of a report, each returned as inline SVG; `save_heat_map` writes a PNG for use outside of a report."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainer.reporting import style
from trainer.reporting.figures import Figure

_CONTROL_COLOURS = (style.CONTROL, style.BASELINE)
_WIDTH = 7.6


def before_after(figures: Sequence[Figure], name: str = "before-after") -> str:
    """Bars before and after (and of controls) with 95 % whiskers; what should fall above what should rise."""
    panels = [
        (title, [figure for figure in figures if figure.direction == direction])
        for title, direction in (("Lower is better", "lower"), ("Higher is better", "higher"))
    ]
    panels = [(title, members) for title, members in panels if members]
    controls = list(dict.fromkeys(control for figure in figures for control in figure.controls))
    series = {"Before": style.BEFORE, "After": style.AFTER, **dict(zip(controls, _CONTROL_COLOURS, strict=False))}
    sizes = [0.6 + 0.17 * sum(_bar_count(figure) + 0.9 for figure in members) for _, members in panels]
    with style.drawing():
        drawing, axes = style.canvas(_WIDTH, 0.5 + sum(sizes), rows=len(panels), height_ratios=sizes, sharex=True)
        for axis, (title, members) in zip(axes, panels, strict=True):
            _grouped_bars(axis, members, series)
            axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes[-1].set_xlabel("share of prompts, with 95 % interval")
        style.legend(drawing, [Patch(color=colour) for colour in series.values()], list(series))
        return style.svg(drawing, name, "Rates before and after the repair with 95 % intervals; figures in the table.")


def _bar_count(figure: Figure) -> int:
    return sum(rate is not None for rate in (figure.before, figure.after)) + len(figure.controls)


def _grouped_bars(axis: Axes, figures: Sequence[Figure], series: Mapping[str, str]) -> None:
    position, ticks = 0.0, []
    for figure in figures:
        shown = {"Before": figure.before, "After": figure.after, **figure.controls}
        bars = [(colour, rate) for label, colour in series.items() if (rate := shown.get(label)) is not None]
        ticks.append(position + (len(bars) - 1) / 2)
        for colour, rate in bars:
            low, high = rate["ci95"]
            axis.barh(position, rate["rate"], height=0.86, color=colour)
            axis.plot([low, high], [position, position], color=style.INK, linewidth=1.2, solid_capstyle="butt")
            axis.plot([low, high], [position] * 2, color=style.INK, marker="|", markersize=5, linestyle="none")
            text = f"{100 * rate['rate']:.1f}".removesuffix(".0") + " %"
            axis.annotate(
                text, (max(high, rate["rate"]), position), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
            position += 1
        position += 0.9
    axis.set_yticks(ticks, [style.plain(figure.label, 44) for figure in figures])
    axis.set_ylim(position - 1.2, -0.9)
    axis.set_xlim(0, 1.09)
    axis.set_xticks(np.linspace(0, 1, 5))
    axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axis.grid(axis="x")
    axis.set_axisbelow(True)


def heat_map(frame: pd.DataFrame, critical: Collection[tuple[int, int]], name: str = "heat-map") -> str:
    """Score per layer and expert, the critical experts outlined.

    `frame` has the columns `layer`, `expert`, `score`; layers may differ in their number of experts (blank cells).
    `critical` holds `(layer, expert)`.
    """
    with style.drawing():
        drawing = _heat_map(frame, critical)
        return style.svg(drawing, name, f"Score of every expert by layer; {len(critical)} critical experts outlined.")


def save_heat_map(frame: pd.DataFrame, critical: Collection[tuple[int, int]], path: Path) -> None:
    """The chart of `heat_map` as a PNG file on white."""
    with style.drawing():
        drawing = _heat_map(frame, critical, ink="#222222")
        drawing.savefig(path, format="png", dpi=150, facecolor="white")


def _heat_map(frame: pd.DataFrame, critical: Collection[tuple[int, int]], ink: str = style.INK) -> Drawing:
    grid = frame.pivot(index="layer", columns="expert", values="score").sort_index(axis=0).sort_index(axis=1)
    scores_LE = grid.to_numpy(dtype=float)
    layers, experts = [int(layer) for layer in grid.index], [int(expert) for expert in grid.columns]
    height = min(9.0, max(2.4, 1.4 + 0.22 * len(layers)))
    drawing, (axis,) = style.canvas(_WIDTH, height)
    finite = np.abs(scores_LE[np.isfinite(scores_LE)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    norm = TwoSlopeNorm(0.0, -limit, limit)
    image = axis.imshow(scores_LE, aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest")
    rows, columns = {layer: i for i, layer in enumerate(layers)}, {expert: i for i, expert in enumerate(experts)}
    boxes = [
        Rectangle((columns[expert] - 0.5, rows[layer] - 0.5), 1, 1)
        for layer, expert in critical
        if layer in rows and expert in columns
    ]
    width = 1.4 if len(experts) <= 64 else 0.8
    axis.add_collection(PatchCollection(boxes, facecolor="none", edgecolor="#111111", linewidth=width))
    axis.set_xlabel("expert", color=ink)
    axis.set_ylabel("layer", color=ink)
    step = -(-len(layers) // 24)
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axis.tick_params(colors=ink)
    bar = drawing.colorbar(image, ax=axis, pad=0.01, fraction=0.04)
    bar.set_label("score", color=ink)
    bar.ax.tick_params(colors=ink)
    bar.outline.set_visible(False)
    return drawing


def drift(rows: Sequence[Mapping[str, Any]], name: str = "drift") -> str:
    """Routing drift per layer, two panels: choices that changed, and KL. `rows`: layer, flip_rate, kl."""
    layers = [int(row["layer"]) for row in rows]
    with style.drawing():
        drawing, axes = style.canvas(_WIDTH, 2.7, columns=2)
        for axis, key, title, colour in (
            (axes[0], "flip_rate", "Expert choices that changed", style.SERIES[0]),
            (axes[1], "kl", "KL(original || repaired), nats", style.SERIES[1]),
        ):
            axis.bar(layers, [float(row[key]) for row in rows], color=colour, width=0.75)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_xlabel("layer")
            axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
            axis.set_ylim(bottom=0)
            axis.grid(axis="y")
            axis.set_axisbelow(True)
        axes[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        return style.svg(drawing, name, "Routing drift per layer.")


def losses(logs: Mapping[str, Sequence[Mapping[str, Any]]], name: str = "losses") -> str | None:
    """Every loss logged against the step, one panel per stage. None where no stage logged a loss at a step."""
    curves = {stage: found for stage, log in logs.items() if (found := _curves(log))}
    if not curves:
        return None
    # One colour per loss over all stages, so that one legend serves all panels.
    names = list(dict.fromkeys(key for found in curves.values() for key in found))
    colours = {key: style.SERIES[index % len(style.SERIES)] for index, key in enumerate(names)}
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    with style.drawing():
        drawing, axes = style.canvas(_WIDTH, 2.7 * rows, rows=rows, columns=columns)
        for axis in axes[len(curves) :]:
            axis.set_axis_off()
        for axis, (stage, found) in zip(axes, curves.items(), strict=False):
            for key, points in found.items():
                mark = "o" if len(points) < 3 else None
                axis.plot(*zip(*points, strict=True), color=colours[key], linewidth=1.6, marker=mark)
            axis.set_title(style.plain(stage), loc="left", fontsize=10)
            axis.set_xlabel("step")
            axis.set_ylabel("loss")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            highest = max(value for points in found.values() for _, value in points)
            axis.set_ylim(min(0.0, axis.get_ylim()[0]), 1.1 * highest if highest > 0 else None)
            axis.grid(axis="y")
        style.legend(drawing, [Line2D([], [], color=colour) for colour in colours.values()], names)
        return style.svg(drawing, name, "Training losses per stage.")


def _curves(log: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in log:
        for key, value in row.items():
            # `train_loss` is the mean over the whole stage, logged once at its end.
            if key.endswith("loss") and key != "train_loss" and "step" in row and isinstance(value, (int, float)):
                curves.setdefault(key, []).append((float(row["step"]), float(value)))
    return curves


def families(figures: Sequence[Figure], name: str = "families") -> str | None:
    """Attack success per family before and after, a line joining both. None without families."""
    members = [figure for figure in figures if figure.key.startswith("asr.")]
    if not members:
        return None
    with style.drawing():
        drawing, (axis,) = style.canvas(_WIDTH, 1.1 + 0.3 * len(members))
        for row, figure in enumerate(members):
            ends = [rate["rate"] for rate in (figure.before, figure.after) if rate]
            axis.plot(ends, [row] * len(ends), color=style.FAINT, linewidth=2, zorder=1)
            for rate, colour, offset in ((figure.before, style.BEFORE, -0.12), (figure.after, style.AFTER, 0.12)):
                if rate:
                    axis.plot(rate["ci95"], [row + offset] * 2, color=colour, linewidth=1.4, alpha=0.7, zorder=2)
                    axis.plot(rate["rate"], row + offset, "o", color=colour, markersize=7, zorder=3)
        axis.set_yticks(range(len(members)), [style.plain(figure.key.removeprefix("asr."), 44) for figure in members])
        axis.set_ylim(len(members) - 0.4, -0.6)
        axis.set_xlim(-0.02, 1.02)
        axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axis.set_xlabel("attack success, with 95 % interval")
        axis.grid(axis="x")
        axis.set_axisbelow(True)
        dots = [Line2D([], [], marker="o", linestyle="none", color=colour) for colour in (style.BEFORE, style.AFTER)]
        style.legend(drawing, dots, ["Before", "After"])
        return style.svg(drawing, name, "Attack success per jailbreak family before and after.")
