"""A Hugging Face hub on 127.0.0.1: enough of its protocol for the real clients, over files given by a test.

    with hub({"openai/gsm8k": {"main/train-00000.parquet": content}}) as url:
        ... HF_ENDPOINT=url ...

It serves models and data sets alike, at one commit of each.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILE = re.compile(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)")
_TREE = re.compile(r"/api/(?:datasets|models)/([^/]+/[^/]+)/tree/.*")
_INFO = re.compile(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/revision/.*)?")


@contextmanager
def hub(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[str]:
    """Serve `repositories` (owner/name -> file -> content) for as long as the context lasts; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if match := _FILE.fullmatch(path):
                content = repositories.get(match[1], {}).get(match[2])
                digest = "" if content is None else hashlib.sha256(content).hexdigest()
                self.answer(content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
            elif match := _TREE.fullmatch(path):
                files = repositories.get(match[1])
                self.answer_json(files and [self.entry(*item) for item in files.items()])
            elif match := _INFO.fullmatch(path):
                self.answer_json({"id": match[1], "sha": COMMIT} if match[1] in repositories else None)
            else:
                self.answer(None)

        do_HEAD = do_GET

        def entry(self, path: str, content: bytes) -> dict[str, object]:
            return {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
            }

        def answer_json(self, value: object | None) -> None:
            self.answer(None if value is None else json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, content: bytes | None, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(404 if content is None else 200)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
