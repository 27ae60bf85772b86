"""Parquet files, streamed a row group at a time: what most published text sets are kept in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from nanoworks.common.errors import UserError, nearest
from nanoworks.data.files import FileOptions, find_files, in_split
from nanoworks.data.records import check_messages
from nanoworks.data.registry import SOURCES
from nanoworks.data.source import Document, Source, SourceOptions

ROWS = 256
"""Rows decoded at once: a row group may be larger than memory."""


class ColumnOptions(SourceOptions):
    column: str = Field(default="text", description="the column of texts, or of lists of messages")
    shuffle: bool = Field(default=False, description="a new order every epoch; published sets come shuffled")


class RowGroups(Source):
    """What every source of parquet files shares: a page is one row group."""

    def __init__(self, options: Any, files: Iterable[Path]) -> None:
        super().__init__(options)
        self._pages: list[tuple[Path, int]] = []
        for path in files:
            with self._open(path) as file:
                self._pages += [(path, group) for group in range(file.num_row_groups)]

    def __len__(self) -> int:
        return len(self._pages)

    def read(self, page: int) -> Iterator[Document | None]:
        path, group = self._pages[page]
        column = self.options.column
        with self._open(path) as file:
            try:
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column]):
                    for value in batch.column(0).to_pylist():
                        if value is None:
                            yield None
                        elif self._wanted(value):
                            yield value if isinstance(value, str) else {"messages": check_messages(value)}
            except (pa.ArrowException, OSError, ValueError) as error:
                raise UserError(f"{path}, row group {group}, column {column!r}: {error}") from error

    def _wanted(self, value: Any) -> bool:
        """Whether a row belongs to the split."""
        return True

    def _open(self, path: Path) -> pq.ParquetFile:
        """Open a file and check that it can be read; UserError names the file and the columns that exist."""
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes); delete it, or fetch it again")
        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a whole parquet file ({error}); fetch it again") from None
        column, schema = self.options.column, file.schema_arrow
        columns = ", ".join(schema.names) or "none"
        if column not in schema.names:
            raise UserError(f"{path} has no column {column!r}{nearest(column, schema.names)}; its columns: {columns}")
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_list(kind)):
            raise UserError(
                f"{path}: column {column!r} holds {kind}, neither texts nor messages; its columns: {columns}"
            )
        if file.metadata.num_rows == 0:
            raise UserError(f"{path} has no rows; its columns: {columns}")
        return file


@SOURCES.register("parquet")
class ParquetSource(RowGroups):
    """Local files."""

    class Options(ColumnOptions, FileOptions):
        pass

    def __init__(self, options: Options) -> None:
        super().__init__(options, find_files(options, (".parquet",)))

    def _wanted(self, value: Any) -> bool:
        return in_split(self.options, (value if isinstance(value, str) else repr(value)).encode())

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.options.path!r})"
