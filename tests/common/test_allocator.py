"""The allocator setting: taken on glibc, silently absent elsewhere."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import pytest

from nanoworks.common.allocator import keep_freed_memory


def test_it_holds_where_the_c_library_is_glibc() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotGlibc:
        def __init__(self, name: Any) -> None: ...

        def mallopt(self, key: int, value: int) -> int:
            raise AssertionError("called on a library that is not glibc")

    monkeypatch.setattr(ctypes, "CDLL", NotGlibc)
    assert keep_freed_memory() is False
