"""schemathesis against /openapi.json: requests that follow the document and requests that break it.

Whatever comes, the server must answer with a status, a content type and a body that the document names, never with
5xx, and must refuse what the document does not allow.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"]
GETS = ["/v1/models", "/v1/models/{model_id}", "/live", "/health", "/ready", "/metrics"]
# That a request follows the document does not make it answerable: a prompt may be too long, a model unknown.
EXCLUDED = [positive_data_acceptance]
OFTEN = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["follows", "breaks"])
@pytest.mark.parametrize("path", POSTS)
def test_bodies(document: Any, path: str, mode: GenerationMode) -> None:
    statuses = set()

    @OFTEN
    @given(document[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call()
        case.validate_response(response, excluded_checks=EXCLUDED)
        statuses.add(response.status_code)

    ask()
    assert statuses == {400} if mode is GenerationMode.NEGATIVE else statuses <= {200, 400, 404}


def test_conversations_that_can_be_answered(document: Any) -> None:
    """Of bodies at random hardly one ends with a question to this model; here each does."""
    operation, answered = document["/v1/chat/completions"]["POST"], []

    @OFTEN
    @given(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), st.text(max_size=20))
    def ask(case: Any, text: str) -> None:
        if not isinstance(case.body, dict):
            return
        case.body.update(messages=[{"role": "user", "content": text}], model="tiny", max_tokens=8, tools=None)
        case.body.update(tool_choice=None, response_format=None, min_tokens=0)
        response = case.call()
        case.validate_response(response, excluded_checks=EXCLUDED)
        answered.append(response.status_code == 200)

    ask()
    assert sum(answered) > len(answered) / 4


@pytest.mark.parametrize("path", GETS)
def test_the_rest(document: Any, path: str) -> None:
    @OFTEN
    @given(document[path]["GET"].as_strategy())
    def ask(case: Any) -> None:
        case.validate_response(case.call(), excluded_checks=EXCLUDED)

    ask()


def test_every_route_is_in_the_document(document: Any, url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {*POSTS, *GETS} <= paths.keys()
    for operations in paths.values():
        for operation in operations.values():
            assert "422" not in operation["responses"]  # FastAPI's own, which nobody gets here
            assert operation.get("summary")
