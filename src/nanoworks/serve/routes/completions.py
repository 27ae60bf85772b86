"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nanoworks.serve.answer.text import TextAnswer
from nanoworks.serve.caller import caller_of
from nanoworks.serve.errors import ApiError
from nanoworks.serve.generation import Generation
from nanoworks.serve.protocol.completions import Completion, CompletionRequest
from nanoworks.serve.routes.common import check_length, check_n, documented, prompts_of
from nanoworks.serve.routes.models import check_model
from nanoworks.serve.state import server_state
from nanoworks.serve.stream import CLIENT_LEFT, EventStream, unless_client_leaves

router = APIRouter()
PATH = "/v1/completions"
DEFAULT_MAX_TOKENS = 16


@router.post(PATH, response_model=None, responses=documented(Completion, chunk=Completion))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one text, or several."""
    state = server_state(request)
    check_model(body.model, state)
    check_n(body.n, state)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    bos = body.add_special_tokens is not False
    prompts = await prompts_of(body.prompt, state, param="prompt", bos=bos)
    if len(prompts) * (body.n or 1) > (most := max(state.settings.max_prompts, state.settings.max_n)):
        message = f"n: {body.n} answers to each of {len(prompts)} prompts are too many; at most {most} in all"
        raise ApiError(400, message, param="n")
    for prompt in prompts:
        check_length(prompt, state, room=min(1, max_tokens), param="prompt")
    params = body.sampling(
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    caller = caller_of(request)
    jobs = [Generation(state, caller, PATH, ids, params, **body.order) for ids in prompts]
    answer = TextAnswer(
        jobs, state.tokenizer, state.head, echo=bool(body.echo), bos_added=bos and _is_text(body.prompt)
    )
    if body.stream:
        return EventStream(answer.events(body.stream_options))
    whole = await unless_client_leaves(request.receive, answer.whole())
    return Response(status_code=CLIENT_LEFT) if whole is None else JSONResponse(whole)


def _is_text(prompt: object) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, list) and isinstance(prompt[0], str))
