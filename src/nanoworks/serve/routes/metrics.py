"""GET /metrics, for Prometheus. With keys it needs an admin's."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanoworks.serve.metrics import CONTENT_TYPE
from nanoworks.serve.state import server_state

router = APIRouter()


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Everything that is counted and measured here, in Prometheus' text format."""
    return Response(server_state(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})
