"""GET / and /ui/...: the chat page and its files.

They are the same for everybody and hold no secret, so they need no key: the page asks for one itself when
/v1/models wants it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

UI = Path(__file__).parents[1] / "ui"

HEADERS = {
    # The page loads nothing from elsewhere and runs no script written into it, whatever a model answers; only
    # DOMPurify may turn text into HTML.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types dompurify",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Asked for again each time, and answered by 304: after an update no old script meets a new page.
    "Cache-Control": "no-cache",
}


class PageFiles(StaticFiles):
    """The files of the page with the page's headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


router = APIRouter()
router.mount("/ui", PageFiles(directory=UI))


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(UI / "index.html", headers=HEADERS)
