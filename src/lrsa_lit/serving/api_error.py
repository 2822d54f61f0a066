"""Errors in OpenAI's format: a message, the wrong field, and a code."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lrsa_lit.errors import printable

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error of a request.

    Args:
        message: one line for people.
        param: the wrong field, for example ``messages[0].content``.
        status: the HTTP status.
        code: an identifier for programs.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = printable(message), param, status, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def add_handlers(app: FastAPI) -> None:
    """Make an app return all errors in this format."""
    for kind, handler in ((ApiError, _own), (HTTPException, _of_http), (Exception, _unknown)):
        app.add_exception_handler(kind, handler)


async def _own(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _of_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return ApiError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code).response()


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    return ApiError("the server failed; see its log", status=500, code="internal_error").response()
