"""GET /live, /health and /ready: for whoever runs the server. They need no key.

/live     this process answers; when it does not, restart it
/health   there is an engine; without one, wait: it is started again by itself
/ready    the engine computes tokens; while it does not, send requests elsewhere
"""

from __future__ import annotations

from fastapi import APIRouter, Request

from nanoworks.serve.errors import ApiError
from nanoworks.serve.state import server_state

router = APIRouter()


@router.get("/live")
async def live() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    error = server_state(request).engine.error
    if error is not None:
        raise ApiError(503, f"there is no engine: {error}; see the server's log", code="no_engine")
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    failure = await server_state(request).canary.failure()
    if failure:
        raise ApiError(503, f"not ready: {failure}", code="not_ready", retry_after=1)
    return {"status": "ok"}
