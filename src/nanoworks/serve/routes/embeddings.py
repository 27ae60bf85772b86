"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from contextlib import aclosing
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nanoworks.engine import SamplingParams
from nanoworks.serve.caller import caller_of
from nanoworks.serve.generation import Generation, together
from nanoworks.serve.protocol.embeddings import EmbeddingList, EmbeddingRequest
from nanoworks.serve.routes.common import check_length, documented, prompts_of
from nanoworks.serve.routes.models import check_model
from nanoworks.serve.state import server_state
from nanoworks.serve.stream import CLIENT_LEFT, unless_client_leaves

router = APIRouter()
PATH = "/v1/embeddings"


@router.post(PATH, response_model=None, responses=documented(EmbeddingList))
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Return the mean of each text's hidden states after the last norm."""
    state = server_state(request)
    check_model(body.model, state)
    prompts = await prompts_of(body.input, state, param="input", bos=True)
    for prompt in prompts:
        check_length(prompt, state, room=0, param="input")
    caller, params = caller_of(request), SamplingParams(max_tokens=0)
    jobs = [Generation(state, caller, PATH, ids, params, user=body.user or "", pooling="mean") for ids in prompts]
    found = await unless_client_leaves(request.receive, _embed(jobs, packed=body.encoding_format == "base64"))
    if found is None:
        return Response(status_code=CLIENT_LEFT)
    tokens = sum(job.prompt_tokens for job in jobs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": found, "model": state.card.id, "usage": usage})


async def _embed(jobs: list[Generation], *, packed: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}] * len(jobs)
    async with aclosing(together(jobs)) as deltas:
        async for index, delta in deltas:
            if delta.finish_reason is not None:
                embedding = _pack(delta.embedding) if packed else delta.embedding
                found[index] = {"object": "embedding", "index": index, "embedding": embedding}
    return found


def _pack(embedding: list[float]) -> str:
    return base64.b64encode(np.asarray(embedding, dtype="<f4").tobytes()).decode()
