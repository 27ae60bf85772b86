"""Draws the plots of a report as SVG. Text stays text: small files, sharp at any size."""

from __future__ import annotations

import io
import re
import statistics
import warnings
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from nanoworks.common import human
from nanoworks.report import palette
from nanoworks.report.blocks import BarPlot, HeatMap, Line, LinePlot, Plot

WIDTH, HEIGHT = 5.2, 2.9  # inches; the page scales the drawing to its column
FEW_CELLS = 16  # rows and columns of a heat map whose cells have room for a figure
SPIKE = 30.0  # a highest value this many times the median asks for a logarithmic axis

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a task's name is a $
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": palette.ink(),
    "xtick.color": palette.ink(),
    "ytick.color": palette.ink(),
    "axes.edgecolor": palette.grid(),
    "axes.labelcolor": palette.ink(),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": palette.grid(),
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the same figures give the same bytes


def draw(plot: Plot) -> str:
    """Return the plot as an `<svg>` element in the colours of `palette`'s CSS variables."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": plot.name}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if isinstance(plot, BarPlot):
            figure.set_size_inches(WIDTH, _bars_height(plot))
            _bars(axes, plot)
        elif isinstance(plot, HeatMap):
            figure.set_size_inches(WIDTH, min(2 * HEIGHT, 0.7 + 0.24 * len(plot.rows)))
            _cells(axes, plot)
        else:
            _lines(axes, plot)
        out = io.StringIO()
        with warnings.catch_warnings():
            # Glyphs that matplotlib's font lacks are only measured here; the reader's fonts draw them.
            warnings.simplefilter("ignore")
            figure.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = out.getvalue()
    return palette.themed(_fluid(svg[svg.index("<svg") :], plot.title))


def standalone(svg: str) -> str:
    """Return the drawing as the content of a file: it brings its colours along."""
    start = svg.index(">") + 1
    return f"{svg[:start]}<style>{palette.css()}</style>{svg[start:]}"


def _fluid(svg: str, title: str) -> str:
    """Let the page decide the size, and name the drawing for readers that do not see it."""
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{opening} role="img" aria-label="{label}">{rest}'


def _lines(axes: Axes, plot: LinePlot) -> None:
    for line in plot.lines:
        _line(axes, line)
    values = [value for line in plot.lines for value in line.values]
    if values and min(values) > 0 and max(values) > SPIKE * statistics.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human.count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("step")
    if len({line.label for line in plot.lines if line.label}) > 1:
        axes.legend(loc="best")


def _line(axes: Axes, line: Line) -> None:
    color, label = palette.series(line.color), line.label or "_nolegend_"
    if line.style == "faint":
        axes.plot(line.steps, line.values, color=color, alpha=0.25, linewidth=0.8)
    elif line.style == "dots":
        axes.plot(line.steps, line.values, color=color, linewidth=1.2, marker="o", markersize=3.5, label=label)
    else:
        axes.plot(line.steps, line.values, color=color, linewidth=1.8, label=label)


def _bars_height(plot: BarPlot) -> float:
    return 0.9 + len(plot.rows) * (0.16 + 0.17 * len(plot.labels))


def _bars(axes: Axes, plot: BarPlot) -> None:
    """Draw horizontal bars: names of tasks are long, and lists of them longer."""
    thickness = 0.8 / len(plot.labels)
    for i, label in enumerate(plot.labels):
        present = {row: value for row, values in enumerate(plot.values) if (value := values[i]) is not None}
        axes.barh(
            [row - 0.4 + (i + 0.5) * thickness for row in present],
            list(present.values()),
            height=thickness * 0.86,
            xerr=[plot.errors[row][i] or 0.0 for row in present],
            error_kw={"ecolor": palette.ink(), "elinewidth": 1},
            color=palette.series(i),
            label=label,
        )
    axes.set_yticks(range(len(plot.rows)), plot.rows)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="y")
    if len(plot.labels) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(plot.labels)))


def _cells(axes: Axes, plot: HeatMap) -> None:
    """Draw each cell in one colour, the less opaque the lower: it follows the theme of the page. Few get figures."""
    columns = max(map(len, plot.values))
    figures = columns <= FEW_CELLS and len(plot.rows) <= FEW_CELLS
    for y, row in enumerate(plot.values):
        for x, value in enumerate(row):
            opacity = 0.85 * min(1.0, value / plot.darkest)
            axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, color=palette.series(0), alpha=opacity, lw=0))
            if figures:
                ink = palette.on_series() if opacity > 0.6 else palette.ink()
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(len(plot.rows) - 0.5, -0.5)
    every = max(1, len(plot.rows) // 20)
    axes.set_yticks(range(0, len(plot.rows), every), plot.rows[::every])
    axes.xaxis.set_major_locator(MaxNLocator(min(columns, 10), integer=True))
    axes.set_xlabel(plot.column)
    axes.grid(visible=False)


def _tick(value: float) -> str:
    return human.count(value) if abs(value) >= 1000 else f"{value:.4g}"
