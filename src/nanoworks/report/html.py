"""Writes a page as one self-contained HTML file: no script, no request, every text escaped."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nanoworks.report import palette
from nanoworks.report.blocks import Page


def render(page: Page, drawings: Mapping[str, str]) -> str:
    """Return the document; `drawings` maps a plot's name to its `<svg>` element."""
    environment = Environment(
        loader=PackageLoader("nanoworks.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The drawings are markup already: matplotlib escapes the texts in them.
    return environment.get_template("report.html.jinja").render(
        page=page,
        drawings={name: Markup(svg) for name, svg in drawings.items()},
        palette=Markup(palette.css()),
    )
