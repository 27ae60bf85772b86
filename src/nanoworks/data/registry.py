"""The table of data sources. Adding a source is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoworks.common.registry import Registry
from nanoworks.data.source import Source

SOURCES: Registry[type[Source]] = Registry(
    "data source",
    {
        "climbmix": "nanoworks.data.hub",
        "fineweb_edu": "nanoworks.data.hub",
        "hub": "nanoworks.data.hub",
        "jsonl": "nanoworks.data.records",
        "microworld": "nanoworks.data.microworld",
        "parquet": "nanoworks.data.parquet",
        "stdlib": "nanoworks.data.stdlib",
        "text": "nanoworks.data.records",
    },
)


def build_source(name: str, options: Mapping[str, Any] | None = None, *, where: str | None = None) -> Source:
    """Return the source called `name` with `options` validated; `where` prefixes what an error says."""
    return SOURCES.get(name)(SOURCES.parse(name, options or {}, where=where))
