"""Rows of a data set, from a local file or from the Hugging Face hub, each read as a mapping by index.

A local file is `.parquet`, `.jsonl` or `.jsonl.gz` with the columns of the hub's version; a directory stands
for all the `.parquet` files in it. From the hub only the Parquet files of the wanted split are fetched, and
kept in its own cache.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanoworks.common.errors import UserError, missing_extra, nearest

SHUFFLE_SEED = 42
"""nanochat shuffles every data set with `datasets.shuffle(seed=42)`; `load_rows` gives the same order."""


@dataclass(frozen=True)
class HubFiles:
    """The files of one split: data set `repo`, and a glob `pattern` inside it."""

    repo: str
    pattern: str


class Rows:
    """A read-only list of rows. An Arrow table stays in Arrow form: a row is made when it is asked for."""

    def __init__(self, data: Sequence[dict[str, Any]] | pa.Table, places: Sequence[str] | str) -> None:
        """`places` names where each row stands ("file:12"), or the one source of all of them."""
        self._data, self._places = data, places
        self._order = np.arange(len(data))

    def arranged(self, *, shuffle: bool, limit: int | None) -> Rows:
        """Return the same rows in nanochat's order (or as they stand), and only the first `limit`."""
        view = Rows(self._data, self._places)
        if shuffle:
            view._order = np.random.default_rng(SHUFFLE_SEED).permutation(len(self._data))
        view._order = view._order[:limit]
        return view

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        at = int(self._order[i])
        if isinstance(self._data, pa.Table):
            row: dict[str, Any] = self._data.slice(at, 1).to_pylist()[0]
            return row
        return self._data[at]

    def where(self, i: int) -> str:
        """Return the place of row i for an error message."""
        at = int(self._order[i])
        return f"{self._places}, row {at}" if isinstance(self._places, str) else self._places[at]


def load_rows(
    path: str | None,
    hub: HubFiles | None,
    columns: Sequence[str],
    *,
    limit: int | None = None,
    shuffle: bool = True,
) -> Rows:
    """Return the rows of `path`, or of `hub` when there is no path; every one has all of `columns`.

    Raises:
        UserError: nothing readable there, a column is missing, there is no row, or the hub is out of reach.
    """
    if path is None and hub is None:
        raise UserError("give the task a local file: path=FILE")
    source = Path(path) if path is not None else _fetch(hub)  # type: ignore[arg-type]
    if not source.exists():
        raise UserError(f"{source}: no such file or directory")
    if source.is_dir() or source.suffix == ".parquet":
        rows = _read_parquet(source, hub.pattern if path is None and hub else "*.parquet", columns)
    elif source.name.endswith((".jsonl", ".jsonl.gz")):
        rows = _read_jsonl(source, columns)
    else:
        raise UserError(f"{source}: cannot read this kind of file; give .parquet, .jsonl or .jsonl.gz")
    if len(rows) == 0:
        raise UserError(f"{source}: no rows in it")
    return rows.arranged(shuffle=shuffle, limit=limit)


def _fetch(hub: HubFiles) -> Path:
    """Return the local snapshot that holds the split's files, downloading what the cache has not."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing_extra("huggingface_hub", "hub") from None
    try:
        return Path(snapshot_download(hub.repo, repo_type="dataset", allow_patterns=[hub.pattern]))
    except Exception as error:  # the client raises its own, httpx's and the system's errors alike
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"could not fetch the data set {hub.repo} from the Hugging Face hub ({reason}); "
            "download it elsewhere and give the file with path=FILE, or copy the hub's cache to this machine"
        ) from None


def _read_parquet(source: Path, pattern: str, columns: Sequence[str]) -> Rows:
    files = sorted(source.glob(pattern)) if source.is_dir() else [source]
    if not files:
        raise UserError(f"{source}: no file matches {pattern}")
    tables = []
    for file in files:
        try:
            known = pq.read_schema(file).names
            for column in columns:
                if column not in known:
                    raise UserError(f"{file}: no column {column!r}{nearest(column, known)}; it has {', '.join(known)}")
            tables.append(pq.read_table(file, columns=list(columns)))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable Parquet file ({error})") from None
    return Rows(pa.concat_tables(tables), str(source))


def _read_jsonl(source: Path, columns: Sequence[str]) -> Rows:
    rows, places = [], []
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        place = f"{source}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 text at byte {error.start} of the line") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        if columns and not isinstance(row, dict):
            raise UserError(f"{place}: a row is an object with the fields {', '.join(columns)}")
        for column in columns:
            if column not in row:
                raise UserError(f"{place}: no field {column!r}{nearest(column, row)}; it has {', '.join(row)}")
        rows.append(row)
        places.append(place)
    return Rows(rows, places)


def _missing(place: str, kind: str, name: str, known: Iterable[str]) -> str:
    return f"{place}: no {kind} {name!r}{nearest(name, known)}; it has {', '.join(known)}"


def _lines(source: Path) -> list[bytes]:
    try:
        data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    except (OSError, EOFError) as error:  # gzip's BadGzipFile is an OSError
        raise UserError(f"{source}: cannot be read ({error})") from None
    return data.split(b"\n")
