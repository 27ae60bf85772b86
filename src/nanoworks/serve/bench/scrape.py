"""The server's own metrics while it is under load: ours, or those of a server that has vLLM's names."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

import httpx

_SERIES = re.compile(r"^(nanoworks|vllm):(\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Snapshot:
    """The values of one moment, those of a name added up over its labels; names without their prefix."""

    time: float
    values: dict[str, float]

    def get(self, name: str) -> float:
        return self.values.get(name, 0.0)


def parse(exposition: str, at: float) -> Snapshot:
    """Read Prometheus' text format; buckets are left out. Without any metric that we know, `values` is empty."""
    values: dict[str, dict[str, float]] = {"nanoworks": {}, "vllm": {}}
    for prefix, name, value in _SERIES.findall(exposition):
        if not name.endswith("_bucket"):
            values[prefix][name] = values[prefix].get(name, 0.0) + float(value)
    return Snapshot(at, values["nanoworks"] or values["vllm"])


class Scraper:
    """Takes a snapshot when entered, every `seconds` from then on, and when left. Without metrics there are none."""

    def __init__(self, url: str, headers: dict[str, str], seconds: float) -> None:
        self.snapshots: list[Snapshot] = []
        self._url, self._seconds = f"{url}/metrics", seconds
        self._http = httpx.AsyncClient(timeout=30, headers=headers)

    async def __aenter__(self) -> Scraper:
        await self._take()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._take()  # what the last requests added
        await self._http.aclose()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self._take()

    async def _take(self) -> None:
        try:
            answer = await self._http.get(self._url)
        except httpx.HTTPError:
            return
        if answer.status_code == 200 and (snapshot := parse(answer.text, time.perf_counter())).values:
            self.snapshots.append(snapshot)
