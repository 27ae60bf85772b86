"""GET /v1/models and /v1/models/{id}: the one model that is served here."""

from __future__ import annotations

from fastapi import APIRouter, Request

from nanoworks.serve.errors import ApiError
from nanoworks.serve.protocol.models import ModelCard, ModelList
from nanoworks.serve.state import ServerState, server_state

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> ModelList:
    """List the one model that is served here."""
    return ModelList(data=[server_state(request).card])


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, request: Request) -> ModelCard:
    """Describe it."""
    state = server_state(request)
    check_model(model_id, state)
    return state.card


def check_model(asked: str | None, state: ServerState) -> None:
    """Raise ApiError 404 unless `asked` is the model served here, or none was named."""
    if asked not in (None, state.card.id):
        message = f"there is no model {asked!r} here, only {state.card.id!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
