"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nanoworks.engine import SamplingParams
from nanoworks.serve.answer.chat import ChatAnswer
from nanoworks.serve.answer.prompt import ToolUse, chat_prompt
from nanoworks.serve.caller import caller_of
from nanoworks.serve.errors import ApiError
from nanoworks.serve.generation import Generation
from nanoworks.serve.protocol.chat import ChatCompletion, ChatCompletionChunk, ChatRequest
from nanoworks.serve.routes.common import beside_the_loop, check_n, check_size, documented
from nanoworks.serve.routes.models import check_model
from nanoworks.serve.state import server_state
from nanoworks.serve.stream import CLIENT_LEFT, EventStream, unless_client_leaves

router = APIRouter()
PATH = "/v1/chat/completions"


@router.post(PATH, response_model=None, responses=documented(ChatCompletion, chunk=ChatCompletionChunk))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    state = server_state(request)
    check_model(body.model, state)
    check_n(body.n, state)
    context, tokenizer = state.engine.max_context, state.tokenizer
    tool_use = ToolUse(body, tokenizer)
    size = sum(len(message.content or "") for message in body.messages)
    check_size(size, state, param="messages")
    prompt = await beside_the_loop(size, lambda: chat_prompt(body.messages, tool_use.tools, tokenizer))
    if len(prompt) >= context:
        raise ApiError(
            400,
            f"the conversation has {len(prompt)} tokens and the model's context holds {context}, "
            "the answer included; shorten it or begin a new one",
            param="messages",
            code="context_length_exceeded",
        )
    params = sampling(body, context, **({"grammar": tool_use.grammar} if tool_use.grammar else {}))
    job = Generation(state, caller_of(request), PATH, prompt, params, **body.order)
    answer = ChatAnswer(job, tokenizer, state.head, tool_use.reader)
    if body.stream:
        return EventStream(answer.events(body.stream_options))
    whole = await unless_client_leaves(request.receive, answer.whole())
    return Response(status_code=CLIENT_LEFT) if whole is None else JSONResponse(whole)


def sampling(body: ChatRequest, context: int, **more: Any) -> SamplingParams:
    """Translate the request. Without a limit an answer may fill the context; the engine clips to that."""
    asked: dict[str, Any] = {
        "max_tokens": body.max_completion_tokens or body.max_tokens or context,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "grammar": body.response_format.grammar() if body.response_format else None,
    }
    return body.sampling(**{**asked, **more})
