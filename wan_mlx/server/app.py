"""The app: the page, the routes of the API, and what stands before them."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from .. import __version__
from .gallery import gallery_routes
from .guard import Guard
from .models import model_routes
from .refused import answer_with_errors
from .studio import Studio
from .videos import video_routes

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(
    studio: Studio,
    names: Collection[str] = ("localhost", "127.0.0.1", "::1"),
    token: str | None = None,
) -> Any:
    """The server's ASGI app.

    Args:
        studio: what it serves.
        names: by which the server may be called (`guard.names_of`).
        token: that every request must have; None for none.
    """
    app = FastAPI(
        title="wan_mlx",
        version=__version__,
        description="Videos by the open Wan models on this machine: a queue that survives, over HTTP.",
        docs_url=None,
        redoc_url=None,
        lifespan=studio.lifespan,
    )
    answer_with_errors(app, studio.library.folder)
    app.include_router(model_routes(studio))  # before /v1/videos/{id}
    app.include_router(video_routes(studio))
    app.include_router(gallery_routes(studio))

    @app.get("/health", summary="Whether the server is alive")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    pages = {path: _page(HERE / name) for path, name in (("/", "page.html"), ("/docs", "api.html"))}

    def show(path: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return pages[path]

    for path in pages:
        show(path)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    studio.has_token = token is not None
    return Guard(app, names, token)


def _page(path: Path) -> Response:
    """A page with its script and style in it, which may run those alone."""
    text = path.read_text(encoding="utf-8")
    allowed = {}
    for kind in ("script", "style"):
        blocks = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", text, re.DOTALL)
        sums = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
        allowed[kind] = " ".join(f"'sha256-{one}'" for one in sums) or "'none'"
    headers = {"content-security-policy": POLICY.format(**allowed), "cache-control": "no-cache"}
    return HTMLResponse(text, headers=headers)
