"""Downloads from a server that behaves, breaks off, lies and is not there."""

from __future__ import annotations

import errno
import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoworks.common.errors import UserError
from nanoworks.data import build_source, download
from nanoworks.data.download import Unreachable, fetch

CONTENT = bytes(range(256)) * 4000


@dataclass
class Hub:
    """What the server has and how it behaves; `requests` are the (path, Range) it was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    breaks_after: int | None = None
    """Bytes after which the next answer breaks off."""
    statuses: list[int] = field(default_factory=list)
    """Of the next answers, instead of the file."""
    lies: bool = False
    ranges: bool = True
    token: str | None = None


@pytest.fixture
def hub(monkeypatch):
    """Like the Hugging Face hub, it redirects to where the bytes are and tells the SHA-256 on the way."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.startswith("/bytes"):
                self.answer(state.files[self.path.removeprefix("/bytes")])
                return
            state.requests.append((self.path, self.headers.get("Range")))
            state.token = self.headers.get("Authorization")
            if state.statuses:
                self.head(state.statuses.pop(0), {"Content-Length": "0"})
            elif self.path not in state.files:
                self.head(404, {"Content-Length": "0"})
            else:
                content = state.files[self.path]
                digest = hashlib.sha256(content + b"!" * state.lies).hexdigest()
                headers = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
                self.head(302, {**headers, "Location": f"/bytes{self.path}", "Content-Length": "0"})

        def answer(self, content: bytes) -> None:
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if state.ranges else 0
            headers = {"Content-Length": str(len(content) - start), "ETag": '"of-the-bytes"'}
            self.head(206 if start else 200, headers)
            until, state.breaks_after = state.breaks_after, None
            self.wfile.write(content[start : None if until is None else start + until])
            self.close_connection = until is not None

        def head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hangs up is part of the tests
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def partials(folder):
    return sorted(path for path in folder.iterdir() if path.name.endswith(".partial"))


def test_a_file_is_fetched_once(hub, tmp_path):
    hub.files["/a"] = CONTENT
    target = tmp_path / "cache" / "a"
    fetch({target: f"{hub.url}/a"}, token="secret")
    assert target.read_bytes() == CONTENT
    assert hub.token == "Bearer secret"
    assert not partials(target.parent)
    asked = len(hub.requests)
    fetch({target: f"{hub.url}/a"})
    assert len(hub.requests) == asked


def test_what_broke_off_is_continued_where_it_stopped(hub, tmp_path):
    hub.files["/a"] = CONTENT
    hub.breaks_after = 300_000
    fetch({tmp_path / "a": f"{hub.url}/a"})
    assert (tmp_path / "a").read_bytes() == CONTENT
    ranges = [asked for _, asked in hub.requests if asked]
    assert len(ranges) == 1
    assert 0 < int(ranges[0][6:-1]) <= 300_000


def test_a_later_run_continues_what_an_earlier_one_left(hub, tmp_path, monkeypatch):
    hub.files["/a"] = CONTENT
    hub.breaks_after = 300_000
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    with pytest.raises(UserError, match="run the same command again to continue"):
        fetch({tmp_path / "a": f"{hub.url}/a"})
    [left] = partials(tmp_path)
    size = left.stat().st_size
    assert left.read_bytes() == CONTENT[:size]
    fetch({tmp_path / "a": f"{hub.url}/a"})
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert hub.requests[-1][1] == f"bytes={size}-"
    assert not partials(tmp_path)


def test_a_server_without_ranges_sends_the_whole_again(hub, tmp_path):
    hub.files["/a"] = CONTENT
    hub.breaks_after, hub.ranges = 300_000, False
    fetch({tmp_path / "a": f"{hub.url}/a"})
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_partial_of_another_version_is_not_continued(hub, tmp_path, monkeypatch):
    hub.files["/a"] = CONTENT
    hub.breaks_after = 300_000
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    with pytest.raises(UserError):
        fetch({tmp_path / "a": f"{hub.url}/a"})
    hub.files["/a"] = CONTENT[::-1]
    fetch({tmp_path / "a": f"{hub.url}/a"})
    assert (tmp_path / "a").read_bytes() == CONTENT[::-1]


def test_a_wrong_checksum_is_never_accepted(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    hub.files["/a"], hub.lies = CONTENT, True
    with pytest.raises(UserError, match="SHA-256 is not the one the server gives"):
        fetch({tmp_path / "a": f"{hub.url}/a"})
    assert not (tmp_path / "a").exists()
    assert not partials(tmp_path)


def test_a_damaged_partial_is_found_out_and_fetched_anew(hub, tmp_path):
    hub.files["/a"] = CONTENT
    version = hashlib.sha256(CONTENT).hexdigest()[:16]
    for damage in (b"x" * 1000, b"x" * (len(CONTENT) + 5), b"x" * len(CONTENT)):
        (tmp_path / f"a.{version}.partial").write_bytes(damage)
        fetch({tmp_path / "a": f"{hub.url}/a"})
        assert (tmp_path / "a").read_bytes() == CONTENT
        (tmp_path / "a").unlink()


def test_a_busy_server_is_asked_again(hub, tmp_path):
    hub.files["/a"] = CONTENT
    hub.statuses = [503, 429]
    fetch({tmp_path / "a": f"{hub.url}/a"})
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "message"), [(404, "no such file"), (401, "HF_TOKEN"), (410, "410")])
def test_a_refusal_is_told_at_once(hub, tmp_path, status, message):
    hub.files["/a"] = CONTENT
    hub.statuses = [status]
    with pytest.raises(UserError, match=message):
        fetch({tmp_path / "a": f"{hub.url}/a"})
    assert len(hub.requests) == 1


def test_one_failure_does_not_hide_behind_the_others(hub, tmp_path):
    hub.files.update({f"/{i}": CONTENT for i in range(6)})
    with pytest.raises(UserError, match="no such file"):
        fetch({tmp_path / str(i): f"{hub.url}/{i}" for i in range(7)})


def test_processes_that_ask_at_once_download_once(hub, tmp_path):
    hub.files["/a"] = CONTENT
    threads = [threading.Thread(target=fetch, args=({tmp_path / "a": f"{hub.url}/a"},)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(hub.requests) == 1


def test_a_full_disk_is_told_with_the_fix(hub, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.files["/a"] = CONTENT
    monkeypatch.setattr(download, "_save", full)
    with pytest.raises(UserError, match=r"cannot write .*/a: No space left on device; .*NANOWORKS_CACHE"):
        fetch({tmp_path / "a": f"{hub.url}/a"})


def test_a_server_that_is_not_there_is_unreachable(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(Unreachable, match="cannot be reached"):
        fetch({tmp_path / "a": "http://127.0.0.1:9/a"})


# The hub's data sets


@pytest.fixture
def shards(hub, tmp_path, monkeypatch):
    """Three shards of two row groups, as `owner/set`; the cache is in tmp_path."""
    for number in range(3):
        path = tmp_path / "shard.parquet"
        pq.write_table(pa.table({"text": [f"{number}.{i}" for i in range(8)]}), path, row_group_size=4)
        hub.files[f"/datasets/owner/set/resolve/main/shard_{number:05d}.parquet"] = path.read_bytes()
    monkeypatch.setenv("NANOWORKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return {"repo": "owner/set", "last_shard": 2}


def test_the_last_shard_is_validation_and_only_what_is_read_is_fetched(hub, shards):
    train = list(build_source("hub", {**shards, "shards": 1}))
    assert train == [f"0.{i}" for i in range(8)]
    assert len(hub.requests) == 1
    assert {text[0] for text in build_source("hub", {**shards, "split": "val"})} == {"2"}
    assert len(hub.requests) == 2
    assert len(list(build_source("hub", {**shards, "split": "all", "shards": 1}))) == 16


def test_more_shards_than_there_are_is_all_of_them(shards):
    assert {text[0] for text in build_source("hub", {**shards, "shards": 500})} == {"0", "1"}


def test_without_the_network_the_cache_serves_and_else_the_alternatives_are_named(hub, shards, monkeypatch):
    list(build_source("hub", {**shards, "shards": 1}))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert len(list(build_source("hub", {**shards, "shards": 1}))) == 8
    with pytest.raises(UserError, match=r"cannot be reached.*stdlib.*microworld.*parquet.*HF_ENDPOINT.*shard_00000"):
        build_source("hub", {**shards, "shards": 2})


@pytest.mark.parametrize(("name", "last"), [("fineweb_edu", "shard_01822"), ("climbmix", "shard_06542")])
def test_nanochats_data_sets_are_known_by_name(hub, shards, name, last):
    with pytest.raises(UserError, match=f"{hub.url}/datasets/karpathy/{name[:4]}.*/resolve/main/{last}.parquet"):
        build_source(name, {"split": "val"})
