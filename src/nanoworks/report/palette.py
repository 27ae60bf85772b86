"""The colours of a report, as CSS variables with a light and a dark value.

A plot is drawn in stand-in colours that are then replaced by variables, so one picture follows the theme of
the page it is in; alone in a file it follows the reader's system.
"""

from __future__ import annotations

import re

# Distinct in hue and lightness, so that neighbours are told apart without colour vision.
SERIES = (
    ("#2563eb", "#6ea8fe"),
    ("#d97706", "#fbbf24"),
    ("#059669", "#34d399"),
    ("#9333ea", "#c99bff"),
    ("#dc2626", "#f98080"),
    ("#0891b2", "#3fd0ea"),
    ("#db2777", "#f58ac0"),
    ("#65a30d", "#a8e05f"),
)
INK = ("#475569", "#a8b3c4")
GRID = ("#e2e8f0", "#2c3646")
ON_SERIES = ("#ffffff", "#0f172a")  # text on a full colour

_VARIABLES = {"--ink": INK, "--grid": GRID, "--on-series": ON_SERIES} | {
    f"--series-{i}": pair for i, pair in enumerate(SERIES)
}
_STAND_INS = {f"#fe00{i:02x}": name for i, name in enumerate(_VARIABLES)}
_BY_NAME = {name: stand_in for stand_in, name in _STAND_INS.items()}


def series(index: int) -> str:
    """Return the stand-in for the colour of stage, run or task number `index`."""
    return _BY_NAME[f"--series-{index % len(SERIES)}"]


def ink() -> str:
    return _BY_NAME["--ink"]


def grid() -> str:
    return _BY_NAME["--grid"]


def on_series() -> str:
    return _BY_NAME["--on-series"]


def css() -> str:
    """Return the rules that define the variables for light and dark."""
    light = "".join(f"{name}:{pair[0]};" for name, pair in _VARIABLES.items())
    dark = "".join(f"{name}:{pair[1]};" for name, pair in _VARIABLES.items())
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def themed(svg: str) -> str:
    """Replace the stand-ins of a drawing by variables; the light colour serves viewers that know none."""

    def variable(match: re.Match[str]) -> str:
        name = _STAND_INS[match[0]]
        return f"var({name},{_VARIABLES[name][0]})"

    return re.sub("|".join(_STAND_INS), variable, svg)
