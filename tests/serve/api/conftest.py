"""A server over the model with random weights, and the official client of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from nanoworks.engine import Engine


@pytest.fixture(scope="module")
def url(serve: Any, random_engine: Engine) -> Iterator[str]:
    with serve(random_engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
