"""How every chart looks, and how a figure becomes SVG that lives inside a page.

Text and lines are drawn in placeholder colours that are replaced by the page's own, so a chart follows light and dark.
The categorical colours are Okabe and Ito's, told apart under every common colour-vision deficiency.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BEFORE, AFTER, CONTROL, BASELINE = "#9a9a9a", "#0072b2", "#e69f00", "#009e73"
SERIES = (AFTER, "#d55e00", BASELINE, CONTROL, "#cc79a7", "#56b4e9")
INK, FAINT = "#010203", "#040506"

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@contextmanager
def drawing() -> Iterator[None]:
    """The style, for the time of one chart; the caller's matplotlib settings stay as they are."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches with a grid of axes, row by row. Needs no display and no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend above the chart, where it covers nothing."""
    figure.legend(handles, [plain(label) for label in labels], loc="outside upper left", ncols=4)


def plain(text: str, limit: int = 60) -> str:
    """Text that matplotlib draws as it stands (no mathematics between dollar signs), cut to `limit` characters."""
    one_line = " ".join(text.split())
    return (one_line if len(one_line) <= limit else one_line[: limit - 1] + "\u2026").replace("$", r"\$")


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline `<svg>`: no external reference, ids prefixed with `name`, with a description."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(?::xlink)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = text.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    width = re.search(r'viewBox="0 0 ([\d.]+)', text)
    size = f' style="--natural:{float(width.group(1)):.0f}pt"' if width else ""
    head = re.sub(r'\s(?:width|height)="[^"]*pt"', "", text[: text.index(">")])
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{head} role="img" aria-label="{label}"{size}{text[text.index(">") :]}'
