"""What a report page is made of: sections of a few kinds of blocks, all text plain and not yet escaped.

`layout` builds a page from the figures; `markdown` and `html` only write it down. Numbers become text before
they get here, so every rendering shows the same digits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    kind: ClassVar[str] = "facts"
    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """The first column names the rows."""

    kind: ClassVar[str] = "table"
    header: list[str]
    rows: list[list[str]]
    words: int = 1
    """How many of the first columns hold words; the others hold figures, aligned to the right."""


@dataclass(frozen=True)
class Line:
    label: str
    steps: list[int]
    values: list[float]
    color: int = 0
    """Index into the palette: one colour for one stage or run throughout a page."""
    style: str = "line"
    """`line`, `faint` (raw values behind a running mean) or `dots` (few points)."""


@dataclass(frozen=True)
class LinePlot:
    """Curves over the steps."""

    kind: ClassVar[str] = "plot"
    name: str
    """Names the picture's file; unique on the page."""
    title: str
    lines: list[Line]


@dataclass(frozen=True)
class BarPlot:
    """For each row a bar per label: `values[row][label]`, None where there is none; whiskers of `errors`."""

    kind: ClassVar[str] = "plot"
    name: str
    title: str
    rows: list[str]
    labels: list[str]
    values: list[list[float | None]]
    errors: list[list[float | None]]


@dataclass(frozen=True)
class HeatMap:
    """A cell for each row and column, darker the higher its value."""

    kind: ClassVar[str] = "plot"
    name: str
    title: str
    rows: list[str]
    column: str
    """What the columns are; they are numbered from 0."""
    values: list[list[float]]
    darkest: float
    """The value of a cell in full colour, and of those above."""


Plot = LinePlot | BarPlot | HeatMap


@dataclass(frozen=True)
class Plots:
    kind: ClassVar[str] = "plots"
    plots: list[Plot]


@dataclass(frozen=True)
class Exchange:
    """A prompt and what a model made of it."""

    kind: ClassVar[str] = "exchange"
    caption: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Fold:
    """A long text, closed until asked for."""

    kind: ClassVar[str] = "fold"
    title: str
    text: str


@dataclass(frozen=True)
class Note:
    kind: ClassVar[str] = "note"
    text: str


Block = Facts | Table | Plots | Exchange | Fold | Note


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    tiles: list[tuple[str, str]]
    """The few figures a reader looks for first: value and name."""
    sections: list[Section]
    notes: list[str] = field(default_factory=list)

    def plots(self) -> list[Plot]:
        """Every plot of the page, in order."""
        return [
            plot
            for section in self.sections
            for block in section.blocks
            if isinstance(block, Plots)
            for plot in block.plots
        ]
