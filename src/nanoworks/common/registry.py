"""A name -> class table that imports an entry only when it is asked for.

The table lists module paths, so that listing the known names costs nothing; the module named there
registers its class under the same name with a decorator. Every registered class carries a pydantic
`Options` class: the settings of that method, declared in the method's own file and validated by
`parse` before anything starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from nanoworks.common.errors import UserError, nearest
from nanoworks.common.validation import explain

T = TypeVar("T")


class Registry(Generic[T]):
    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        """`kind` is the word used in errors ("data source"); `table` maps a name to its module path."""
        self.kind = kind
        self._modules = dict(table)
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            if self._entries.get(name, entry) is not entry:
                raise ValueError(f"two {self.kind}s are called {name!r}")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry called `name`; an unknown name raises UserError with the nearest one."""
        if name not in self._entries:
            if name not in self._modules:
                known = ", ".join(self)
                raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self)}; known: {known}")
            importlib.import_module(self._modules[name])
        return self._entries[name]

    def options(self, name: str) -> type[BaseModel]:
        """Return the `Options` class of the entry called `name`."""
        return self.get(name).Options  # type: ignore[attr-defined]

    def parse(self, name: str, values: Mapping[str, Any], *, where: str | None = None) -> Any:
        """Validate `values` as the options of `name`; UserError names each wrong key, prefixed by `where`."""
        model = self.options(name)
        try:
            return model(**values)
        except ValidationError as error:
            raise UserError(explain(error, model, prefix=where or f"{self.kind} {name}")) from None

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._modules, *self._entries}))
