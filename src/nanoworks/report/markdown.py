"""Writes a page as Markdown (GitHub's flavour); plots are pictures beside the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nanoworks.report.blocks import Block, Exchange, Facts, Fold, Note, Page, Plots, Section, Table

_SPECIAL = re.compile(r"[\\`*\[\]|~#$!]|(?<!\w)_|_(?!\w)")  # an underscore inside a word is only itself


def render(page: Page, pictures: Mapping[str, str]) -> str:
    """Return the document; `pictures` maps a plot's name to its file's path, relative to the document."""
    parts = [f"# {escape(page.title)}", escape(page.subtitle)]
    parts.append(_table(Table([name for _, name in page.tiles], [[value for value, _ in page.tiles]])))
    parts += [f"> {escape(note)}" for note in page.notes]
    for section in page.sections:
        parts += _section(section, pictures)
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown and HTML both show as it is, on one line."""
    entities = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\g<0>", " ".join(entities.split()))


def _section(section: Section, pictures: Mapping[str, str]) -> list[str]:
    return [f"## {escape(section.title)}"] + [_block(block, pictures) for block in section.blocks]


def _block(block: Block, pictures: Mapping[str, str]) -> str:
    match block:
        case Facts(rows):
            return "\n".join(f"- {escape(name)}: {escape(value)}" for name, value in rows)
        case Table():
            return _table(block)
        case Plots(plots):
            return "\n".join(f"![{escape(plot.title)}]({pictures[plot.name]})" for plot in plots)
        case Exchange(caption, prompt, completion):
            return f"**{escape(caption)}**\n\nPrompt:\n\n{_fence(prompt)}\n\nCompletion:\n\n{_fence(completion)}"
        case Fold(title, text):
            return f"<details><summary>{escape(title)}</summary>\n\n{_fence(text)}\n\n</details>"
        case Note(text):
            return escape(text)


def _table(table: Table) -> str:
    rules = ["---"] * table.words + ["---:"] * (len(table.header) - table.words)
    return "\n".join([_row(table.header), "| " + " | ".join(rules) + " |", *map(_row, table.rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"


def _fence(text: str) -> str:
    """Put text into a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"
