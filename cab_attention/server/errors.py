"""Errors in OpenAI's form. A message names what was given only to who gave it; nothing of a request is logged."""

import logging
import traceback
from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("cab_attention.server")

LONGEST = 500  # characters of a message
TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
PHRASES = {404: "there is nothing at this path", 405: "this path does not take this method"}


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorFields


class ApiError(HTTPException):
    """An answer other than 2xx: one line, and the parameter that it is about."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, headers)
        self.param = param
        self.code = code

    @property
    def body(self) -> ErrorResponse:
        kind = TYPES.get(self.status_code, "invalid_request_error")
        param = None if self.param is None else one_line(self.param)
        return ErrorResponse(error=ErrorFields(message=one_line(self.detail), type=kind, param=param, code=self.code))

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status_code, self.headers)


def one_line(text: str) -> str:
    """In one line, not too long, and such that it can be encoded."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def failed(error: BaseException) -> ApiError:
    """The answer to a request that the server failed on. Logged: the kind of error and where, not its message."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a request failed with %s:\n%s", type(error).__name__, where)
    if type(error).__name__ == "OutOfMemoryError":
        return ApiError(500, "there is not enough GPU memory for this request", code="out_of_memory")
    if isinstance(error, FloatingPointError):
        return ApiError(500, "the model's logits are not numbers: no token can be chosen", code="not_a_number")
    return ApiError(500, "the server failed on this request", code="internal_error")


def invalid(errors: Sequence[Any], not_supported: Collection[str]) -> ApiError:
    """The 400 for what pydantic found: its first parameter, and all that is wrong with that."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    place = [part for part in first["loc"] if part != "body"]
    param = str(place[0]) if place else None
    if param is None:
        return ApiError(400, f"the body must be a JSON object: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {'.'.join(map(str, place))}", param=param, code="unknown_parameter")
    if param in not_supported:
        return ApiError(400, f"{param} is not supported, leave it out", param=param, code="not_supported")
    of_param = [error["msg"] for error in errors if param in error["loc"]]
    messages = dict.fromkeys(message.removeprefix("Value error, ") for message in of_param)
    return ApiError(400, f"{param}: {' or '.join(messages)}", param=param)


def answer_errors(app: FastAPI, not_supported: Collection[str]) -> None:
    """Let the app answer every error in this form; of some parameters only the values are known that ask nothing."""

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error.response
        message = PHRASES.get(error.status_code, "the request cannot be read")
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error.errors(), not_supported).response

    app.add_middleware(UnexpectedErrors)


class UnexpectedErrors:
    """Answers 500 to anything else; Starlette's own handler would raise it again, to be logged with its message."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception as error:
            answer = failed(error).response
            if not started and scope["type"] == "http":
                await answer(scope, receive, send)
