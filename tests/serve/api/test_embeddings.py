"""POST /v1/embeddings, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
import torch

from nanoworks.engine import Engine
from nanoworks.nn.context import DenseContext


@torch.no_grad()
def mean_of_hidden_states(engine: Engine, ids: list[int]) -> list[float]:
    tokens = torch.tensor([ids])
    hidden = engine.model.head.norm(engine.model(tokens, DenseContext(tokens)))
    return hidden[0].double().mean(0).tolist()


def test_an_embedding_is_the_mean_of_the_hidden_states(client: openai.OpenAI, random_engine: Engine) -> None:
    tokenizer = random_engine.tokenizer
    texts = ["hello", "a longer text"]
    ids = [tokenizer.encode(text, bos=True) for text in texts]
    for given in (texts, ids):
        for options in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
            answer = client.embeddings.create(model="tiny", input=given, **options)
            assert [item.index for item in answer.data] == [0, 1]
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
            for item, tokens in zip(answer.data, ids, strict=True):
                assert item.embedding == pytest.approx(mean_of_hidden_states(random_engine, tokens), abs=1e-4)
    one = client.embeddings.create(model="tiny", input="hello")
    assert one.data[0].embedding == pytest.approx(mean_of_hidden_states(random_engine, ids[0]), abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": ""}, []),
        ({"input": []}, []),
        ({"input": ["x", ""]}, []),
        ({"input": "x" * 300}, ["301 tokens", "128"]),
        ({"input": "x", "dimensions": 8}, ["dimensions", "not supported"]),
        ({"input": "x", "encoding_format": "int8"}, ["encoding_format"]),
        ({}, ["input"]),
    ],
)
def test_what_cannot_be_embedded(url: str, fields: Any, words: list[str]) -> None:
    response = httpx.post(f"{url}/v1/embeddings", json=fields)
    assert response.status_code == 400
    assert all(word in response.json()["error"]["message"] for word in words), response.text


def test_tokens_there_and_back(url: str, random_engine: Engine) -> None:
    tokenizer = random_engine.tokenizer
    found = httpx.post(f"{url}/tokenize", json={"prompt": "héllo", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode("héllo", bos=True)
    assert (found["count"], found["max_model_len"]) == (7, 128)
    assert found["token_strs"][:2] == ["<|bos|>", "h"]
    bare = httpx.post(f"{url}/tokenize", json={"prompt": "héllo", "add_special_tokens": False}).json()
    assert bare["tokens"] == found["tokens"][1:]
    assert httpx.post(f"{url}/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": "héllo"}
    messages = [{"role": "user", "content": "hi"}]
    chat = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()
    assert chat["tokens"] == tokenizer.render_for_completion({"messages": messages})
    for path, body in (("tokenize", {}), ("tokenize", {"prompt": "", "messages": messages}), ("detokenize", {})):
        assert httpx.post(f"{url}/{path}", json=body).status_code == 400
    assert "99999" in httpx.post(f"{url}/detokenize", json={"tokens": [99999]}).json()["error"]["message"]


def test_a_long_text_is_tokenized(url: str) -> None:
    """Beside the event loop, and to the same tokens."""
    text = "ab " * 20_000
    assert httpx.post(f"{url}/tokenize", json={"prompt": text}).json()["count"] == 60_001
