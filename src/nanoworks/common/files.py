"""Writing so that a reader never sees half of a file or a directory, and knowing when bytes have changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoworks.common.errors import UserError

MANIFEST = "manifest.json"


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a scratch directory that becomes `target` when the block ends well and is removed otherwise.

    A manifest of sizes and SHA-256 sums is written last; an existing `target` is replaced.

    Raises:
        UserError: the disk is full or not writable; `target` is then as it was before.
    """
    scratch = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        _write_manifest(scratch)
        _sync_tree(scratch)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.rename(target, old)
        os.rename(scratch, target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(
            f"could not write {target}: {error.strerror or error}; free some space or choose another run.root "
            "(what was saved before is untouched)"
        ) from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def atomic_write(path: Path, text: str) -> None:
    """Replace the file at `path` by `text` (UTF-8) in one step."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def verify_directory(directory: Path) -> None:
    """Check every file against the directory's manifest; UserError names the first that differs.

    A directory without a manifest (a foreign checkpoint) passes.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{manifest} is damaged; this checkpoint cannot be trusted") from None
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing; the checkpoint is incomplete")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"{path} is truncated or altered: {size} bytes instead of {entry['bytes']}")
        if _sha256(path) != entry["sha256"]:
            raise UserError(f"{path} is altered: its SHA-256 differs from the manifest's")


def _write_manifest(directory: Path) -> None:
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
