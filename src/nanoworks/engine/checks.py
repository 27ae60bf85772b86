"""What a request must not ask for."""

from __future__ import annotations

from nanoworks.common.errors import UserError
from nanoworks.config.model import ModelConfig
from nanoworks.engine.config import EngineConfig
from nanoworks.engine.request import Request


def check_request(request: Request, config: EngineConfig, model: ModelConfig, *, known: int | None, room: int) -> None:
    """Raise UserError when an engine can never run `request`.

    Args:
        config: of the engine.
        known: tokens that its tokenizer has; None: it has none.
        room: most tokens that a sequence may have.
    """
    params, more = request.params, request.continuations
    if request.pooling and (params.max_tokens or params.prompt_logprobs or more):
        raise UserError("an embedding is made of the prompt alone: max_tokens=0, and nothing to score")
    given = [request.prompt_ids, *more]
    if not all(len(ids) for ids in given):
        raise UserError("a prompt and a continuation have at least one token; begin the prompt with bos")
    wrong = next((t for ids in given for t in ids if not 0 <= t < model.vocab_size), None)
    if wrong is not None:
        raise UserError(f"token id {wrong} is outside the model's vocabulary of {model.vocab_size}")
    if params.stop and known is None:
        raise UserError("stop strings need a tokenizer; use stop_ids")
    if params.grammar is not None and config.typical_acceptance:
        raise UserError("typical_acceptance takes tokens past the grammar; run the engine without it")
    vocabulary = model.vocab_size if known is None else known
    wrong = next((t for t in params.logit_bias if not 0 <= t < vocabulary), None)
    if wrong is not None:
        raise UserError(f"logit_bias names token id {wrong}, outside the vocabulary of {vocabulary}")
    length = len(request.prompt_ids)
    wanted = max(map(len, more), default=min(1, params.max_tokens))
    if length + wanted > room:
        limit = "context" if room == model.max_position_embeddings else "KV cache"
        raise UserError(
            f"the prompt has {length} tokens and needs room for {wanted} more, but the {limit} holds {room}; shorten "
            "the prompt"
        )
