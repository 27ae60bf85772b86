"""The Python standard library of the running interpreter: 12 MB of real English and code, no download.

Its test suites are left out. Whole files are held out for validation, by a hash of their path, so the split
is the same on every machine with the same Python.
"""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from nanoworks.common.errors import UserError
from nanoworks.data.files import cut, is_validation
from nanoworks.data.registry import SOURCES
from nanoworks.data.source import Document, Source, SourceOptions

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@SOURCES.register("stdlib")
class StdlibSource(Source):
    """A page is one file."""

    class Options(SourceOptions):
        val_fraction: float = Field(default=0.05, gt=0, lt=1, description="share of the files held out")
        document_chars: int | None = Field(
            default=2048, gt=0, description="files are cut into documents of this; null: whole files"
        )
        path: str | None = Field(default=None, description="a folder of Python files in its place")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        root = Path(options.path or sysconfig.get_path("stdlib"))
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        self._files = [
            root / name
            for name in names
            if _LEFT_OUT.isdisjoint(name.split("/"))
            and (
                options.split == "all" or is_validation(name.encode(), options.val_fraction) == (options.split == "val")
            )
        ]
        if not self._files:
            raise UserError(
                f"no Python files for the split {options.split!r} in {root}; install the interpreter's "
                "standard library, give its path, or use the sources microworld, text or parquet"
            )

    def __len__(self) -> int:
        return len(self._files)

    def read(self, page: int) -> Iterator[Document]:
        with tokenize.open(self._files[page]) as file:  # a Python file may declare another encoding
            yield from cut(file.read(), self.options.document_chars)

    def __str__(self) -> str:
        return "the Python standard library"
