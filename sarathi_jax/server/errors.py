"""Errors as OpenAI's API reports them."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

_MAX_MESSAGE = 1000  # it may quote what the client sent
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field that it is about."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
      status: of HTTP.
      message: what to change.
      param: the field that it is about.
      code: short name of the reason, for programs.
      retry_after_s: when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ):
        message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.detail = ErrorDetail(message=message, type=_TYPES.get(status, "api_error"), param=param, code=code)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.detail.model_dump()}

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after_s + 0.5)))}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def unavailable(message: str, code: str) -> ApiError:
    """503: this server cannot serve now, another one or a later try may."""
    return ApiError(503, message, code=code, retry_after_s=1)


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses: unknown paths and methods, bodies that are no JSON."""
    assert isinstance(error, HTTPException)
    answer = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}").response()
    answer.headers.update(error.headers or {})
    return answer


async def answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body of another form than documented: 400 with the first field that is wrong."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [part for part in first["loc"] if part != "body"]
    name = str(path[0]) if path else None
    match first["type"]:
        case "unknown_field":
            name = name or first["ctx"]["name"]
            message, code = ".".join([*map(str, path), first["msg"]]), "unknown_parameter"
        case "missing" if name is None:
            message, code = "the request has no JSON body", "invalid_json"
        case "missing":
            message, code = f"{'.'.join(map(str, path))} is missing", "missing_required_parameter"
        case "json_invalid":
            reason = first.get("ctx", {}).get("error", "")
            name, message, code = None, f"the body is not valid JSON: {reason}", "invalid_json"
        case _:
            where = ".".join(map(str, path)) or "the body"
            message, code = f"{where}: {first['msg']}", "invalid_value"
    return ApiError(400, message, param=name, code=code).response()
