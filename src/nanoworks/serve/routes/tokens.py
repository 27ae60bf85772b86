"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request

from nanoworks.serve.answer.prompt import chat_prompt
from nanoworks.serve.protocol.tokens import DetokenizeRequest, Text, TokenizeRequest, Tokens
from nanoworks.serve.routes.common import beside_the_loop
from nanoworks.serve.routes.models import check_model
from nanoworks.serve.state import server_state

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
    """Return the tokens of a text, or of the prompt that a conversation becomes."""
    state = server_state(request)
    check_model(body.model, state)
    tokenizer = state.tokenizer
    if body.messages is None:
        text = body.prompt or ""
        ids = await beside_the_loop(len(text), lambda: tokenizer.encode(text, bos=body.add_special_tokens is not False))
    else:
        messages, tools = body.messages, body.tools or []
        size = sum(len(message.content or "") for message in messages)
        ids = await beside_the_loop(size, lambda: chat_prompt(messages, tools, tokenizer))
    names = [tokenizer.decode([i]) for i in ids] if body.return_token_strs else None
    return Tokens(tokens=ids, count=len(ids), max_model_len=state.engine.max_context, token_strs=names)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Text:
    """Return the text of tokens."""
    state = server_state(request)
    check_model(body.model, state)
    return Text(prompt=state.tokenizer.decode(body.tokens))
