"""Errors of the API, in the shape that OpenAI's have."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import BusyError, UsageError, WanError, printable
from .library import plain

# Status → what it is called, where nothing else is.
CODES = {
    400: "invalid_value", 401: "bad_token", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    409: "conflict", 413: "too_large", 415: "wrong_kind", 422: "invalid_value", 500: "failed", 503: "not_ready",
}  # fmt: skip
LONGEST = 600
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Refused(Exception):
    """A request that is answered with an error: one line, the field that is wrong, and a word for programs."""

    def __init__(self, status: int, message: str, code: str = "", param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code or CODES.get(status, "failed"), param


def body(status: int, message: object, code: str = "", param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    line = printable(message)
    line = line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return {"error": {"message": line, "type": kind, "param": param, "code": code or CODES.get(status, "failed")}}


def reply(status: int, message: object, code: str = "", param: str | None = None) -> JSONResponse:
    return JSONResponse(body(status, message, code, param), status)


def answer_with_errors(app: FastAPI, folder: Path) -> None:
    """Have every failure of the app's routes answered in this shape; what wan_mlx says, without a path of this machine.

    Args:
        folder: of the library.
    """

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return reply(error.status, error, error.code, error.param)

    @app.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> JSONResponse:
        known = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        found = reply(error.status_code, known.get(error.status_code, error.detail))
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(word) for word in first["loc"][1:]]
        return reply(400, f"{'.'.join(where) or 'the request'}: {first['msg']}", param=where[0] if where else None)

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        return reply(409, plain(str(error), folder))

    for wrong in (UsageError, ValueError):

        @app.exception_handler(wrong)
        async def usage(request: Request, error: Exception) -> JSONResponse:
            return reply(400, plain(str(error), folder))

    @app.exception_handler(OSError)
    async def of_system(request: Request, error: OSError) -> JSONResponse:
        if error.errno in NO_ROOM:
            return reply(507, "the library's disk is full; make room and try again", "disk_full")
        return reply(500, f"the library cannot be used: {error.strerror or 'a file failed'}")

    @app.exception_handler(WanError)
    async def failed(request: Request, error: WanError) -> JSONResponse:
        return reply(500, plain(str(error), folder))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return reply(500, f"{type(error).__name__}: a fault of wan_mlx's own; the server's terminal says more")
