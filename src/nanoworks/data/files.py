"""Finding local data files, and dividing what is in them into documents, training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Literal

from pydantic import Field

from nanoworks.common.errors import UserError
from nanoworks.data.source import SourceOptions


class FileOptions(SourceOptions):
    """What every source of local files can be told."""

    path: str | list[str] = Field(description="a file, a folder with all below it, a pattern, or several")
    validation: Literal["hash", "last_file"] = Field(
        default="hash",
        description="which documents are validation: those whose hash falls below val_fraction (equal "
        "documents fall on the same side), or the whole last file by name",
    )
    val_fraction: float = Field(default=0.02, gt=0, lt=1, description="for validation: hash")


def find_files(options: FileOptions, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of `options.path` that the split reads, sorted by path.

    Raises:
        UserError: nothing is there, nothing has one of the `suffixes`, or one file cannot be split by file.
    """
    files: set[Path] = set()
    for pattern in [options.path] if isinstance(options.path, str) else options.path:
        root = Path(pattern).expanduser()
        if root.is_file():
            found = [root]
        elif root.is_dir():
            found = [path for path in root.rglob("*") if path.is_file() and path.name.endswith(suffixes)]
        else:
            found = [path for path in map(Path, glob(str(root), recursive=True)) if path.is_file()]
        if not found:
            raise UserError(
                f"there is no data at {pattern!r}: give an existing file, a folder with {' or '.join(suffixes)} "
                "files, or a pattern"
            )
        files.update(found)
    ordered = sorted(files)
    if options.validation == "hash" or options.split == "all":
        return ordered
    if len(ordered) < 2:
        raise UserError(
            f"validation: last_file needs at least two files, {options.path!r} has one; use validation: hash"
        )
    return ordered[:-1] if options.split == "train" else ordered[-1:]


def in_split(options: FileOptions, content: bytes) -> bool:
    """Return whether the document with these bytes belongs to the split that `options` ask for."""
    if options.split == "all" or options.validation == "last_file":
        return True
    return is_validation(content, options.val_fraction) == (options.split == "val")


def is_validation(content: bytes, fraction: float) -> bool:
    """Return whether a hash of `content`, spread evenly over [0, 1), lies below `fraction`."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def cut(text: str, limit: int | None) -> Iterator[str]:
    """Yield the pieces of `text`, none longer than `limit` characters; together they are the text.

    Each ends after a blank line if one lies in its second half, else after a line, else at the limit.
    """
    start = 0
    while limit is not None and len(text) - start > limit:
        stop = text.rfind("\n\n", start + limit // 2, start + limit) + 2
        if stop < 2:
            stop = text.rfind("\n", start, start + limit) + 1
        if stop < 1:
            stop = start + limit
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]
