"""Fetching files over HTTP into a cache: resumable, checked, with a progress bar.

A file grows under a name that ends in `.partial` and carries the version it belongs to; when its size and, if
the server tells it, its SHA-256 are right, it gets its real name. So a file under its real name is whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nanoworks.common.errors import UserError

log = logging.getLogger(__name__)

WORKERS = 4
ATTEMPTS = 5
PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""


class Unreachable(UserError):
    """No connection to the server could be made."""


class _Remote(NamedTuple):
    """What the server says of a file."""

    version: str
    size: int | None
    sha256: str | None


class _Broken(Exception):
    """This attempt failed; another may succeed."""


def cache_dir() -> Path:
    """Return `$NANOWORKS_CACHE`, or `~/.cache/nanoworks`."""
    return Path(os.environ.get("NANOWORKS_CACHE") or "~/.cache/nanoworks").expanduser()


def fetch(files: Mapping[Path, str], *, token: str | None = None) -> None:
    """Download each URL to its path, unless the path exists. Processes that ask at once download once.

    Raises:
        Unreachable: the server cannot be reached.
        UserError: the server refuses, a file does not have its checksum, or the disk is full.
    """
    if all(path.exists() for path in files):
        return
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(next(iter(files)).parent):
        missing = {path: url for path, url in files.items() if not path.exists()}
        if missing:
            _fetch(missing, {"Authorization": f"Bearer {token}"} if token else {})


def _fetch(missing: Mapping[Path, str], headers: Mapping[str, str]) -> None:
    stop = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress,
        httpx.Client(headers=dict(headers), follow_redirects=True, timeout=30) as client,
        ThreadPoolExecutor(WORKERS) as pool,
    ):

        def one(path: Path, url: str) -> None:
            task = progress.add_task(path.name, total=None)

            def show(done: int, size: int | None) -> None:
                if stop.is_set():
                    raise InterruptedError
                progress.update(task, completed=done, total=size)

            _download(client, url, path, show)
            progress.update(task, visible=len(missing) <= 2 * WORKERS)

        downloads = [pool.submit(one, path, url) for path, url in missing.items()]
        try:
            for download in downloads:
                download.result()
        except BaseException:
            stop.set()  # what was fetched so far stays as .partial
            pool.shutdown(cancel_futures=True)
            raise


def _download(client: httpx.Client, url: str, path: Path, show: Callable[[int, int | None], None]) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _attempt(client, url, path, show)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise Unreachable(f"{url} cannot be reached ({error})") from error
        except (httpx.TransportError, _Broken) as error:
            if attempt == ATTEMPTS:
                raise UserError(f"{url}: {error}; run the same command again to continue") from error
            log.warning("%s: %s; attempt %d of %d", path.name, error, attempt + 1, ATTEMPTS)
            time.sleep(PAUSE * 2 ** (attempt - 1))
        except httpx.HTTPError as error:
            raise UserError(f"{url}: {error}") from error
        except InterruptedError:
            raise
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; free some space, or set NANOWORKS_CACHE to another folder"
            ) from error


def _attempt(client: httpx.Client, url: str, path: Path, show: Callable[[int, int | None], None]) -> None:
    with client.stream("GET", url, headers=_PLAIN) as response:
        _check(response, url)
        remote = _describe(response)
        partial = path.with_name(f"{path.name}.{remote.version}.partial")
        done = partial.stat().st_size if partial.exists() else 0
        if remote.size is None or done > remote.size:
            done = 0  # not to be trusted: begin again
        if done == 0:
            _save(response, partial, 0, remote.size, show)
    if done and done != remote.size:
        with client.stream("GET", url, headers={**_PLAIN, "Range": f"bytes={done}-"}) as response:
            _check(response, url)
            partly = response.status_code == httpx.codes.PARTIAL_CONTENT
            _save(response, partial, done if partly else 0, remote.size, show)
    _verify(partial, remote)
    os.replace(partial, path)


_PLAIN = {"Accept-Encoding": "identity"}  # sizes and ranges are then those of the file


def _check(response: httpx.Response, url: str) -> None:
    status = response.status_code
    if status >= 500 or status == httpx.codes.TOO_MANY_REQUESTS:
        raise _Broken(f"the server answered {status}")
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise UserError(f"{url}: access refused ({status}); set HF_TOKEN to a token that may read it")
    if status == httpx.codes.NOT_FOUND:
        raise UserError(f"{url}: there is no such file; check the repository, the file pattern and the shards")
    response.raise_for_status()


def _describe(response: httpx.Response) -> _Remote:
    """Read version, size and checksum of the file; the Hugging Face hub tells them where it redirects."""
    hops = (*response.history, response)
    headers = next((hop.headers for hop in hops if "x-linked-etag" in hop.headers), response.headers)
    etag = (headers.get("x-linked-etag") or headers.get("etag", "")).removeprefix("W/").strip('"')
    size = headers.get("x-linked-size") or response.headers.get("content-length")
    version = re.sub(r"[^0-9A-Za-z]", "", etag)[:16] or "unversioned"
    return _Remote(version, int(size) if size else None, etag if re.fullmatch("[0-9a-f]{64}", etag) else None)


def _save(
    response: httpx.Response, partial: Path, done: int, size: int | None, show: Callable[[int, int | None], None]
) -> None:
    with partial.open("ab" if done else "wb") as file:
        for chunk in response.iter_bytes():
            file.write(chunk)
            done += len(chunk)
            show(done, size)


def _verify(partial: Path, remote: _Remote) -> None:
    size = partial.stat().st_size
    if remote.size is not None and size != remote.size:
        raise _Broken(f"{size} of {remote.size} bytes arrived")
    if remote.sha256 is not None:
        digest = hashlib.sha256()
        with partial.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != remote.sha256:
            partial.unlink()
            raise _Broken("its SHA-256 is not the one the server gives")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time write into `folder`; the system frees the lock of a process that dies."""
    with (folder / ".lock").open("w") as file:
        with suppress(ImportError):  # no such lock on Windows
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
