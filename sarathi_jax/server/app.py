"""The application: which path does what."""

import html
import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sarathi_jax.server.chat import ChatAnswer, Chats, chat_tokens
from sarathi_jax.server.completions import CompletionAnswer, Completions
from sarathi_jax.server.errors import (
    ApiError,
    ErrorBody,
    answer_api_error,
    answer_http_error,
    answer_invalid,
    unavailable,
)
from sarathi_jax.server.front import Front
from sarathi_jax.server.gate import Gate, GateSettings
from sarathi_jax.server.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from sarathi_jax.server.streams import EventStream, until_gone

_TEXTS = {
    400: "A field that is wrong, unknown or not honoured",
    401: "No valid key",
    404: "No such model or path",
    408: "The body or the answer took too long",
    413: "The body is too large",
    429: "Too much is asked at once",
    503: "The server is starting, going down or broken",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _TEXTS.items()
}


def create_app(
    front: Front,
    settings: GateSettings | None = None,
    *,
    metrics: Callable[[], bytes] | None = None,
    refused: Callable[[int], None] | None = None,
    routers: Sequence[APIRouter] = (),
) -> Gate:
    """The ASGI application of a server.

    Args:
      front: to the engine, whose loop runs already.
      settings: of the gate before it.
      metrics: the text of `/metrics`, in Prometheus' format; None: there is no such page.
      refused: told the status of every answer that is an error.
      routers: further pages.
    """
    app = FastAPI(title="sarathi_jax", version=_version(), docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(ClientDisconnect, _answer_gone)
    app.add_exception_handler(Exception, _answer_failure)
    app.include_router(_inference(front))
    app.include_router(_operation(front, metrics))
    for router in routers:
        app.include_router(router)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_docs_page(app.openapi()))

    def before_body(path: str) -> None:
        if path.startswith("/v1/"):
            front.check_room()

    return Gate(app, settings or GateSettings(), before_body, refused)


def _inference(front: Front) -> APIRouter:
    router = APIRouter(responses=_ERRORS)
    completions, chats, started_s = Completions(front), Chats(front), int(time.time())

    @router.post("/v1/completions", response_model=None)
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Goes on with one text or several."""
        return await _answer(request, completions.open(body, request.state.request_id), body.stream)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answers a conversation."""
        return await _answer(request, chats.open(body, request.state.request_id), body.stream)

    def describe(name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": started_s, "owned_by": "sarathi_jax"}
        return about | {"root": front.served.names[0], "max_model_len": front.served.max_model_len}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names of the model that is served."""
        return {"object": "list", "data": [describe(name) for name in front.served.names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        front.check_model(name)
        return describe(name)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """The tokens of a text or of a conversation."""
        if body.model is not None:
            front.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")
        if body.messages is not None:
            tokens = await chat_tokens(front, body.messages, [])
        else:
            tokens = await front.encode(body.prompt or "", body.add_special_tokens is not False)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": front.served.max_model_len}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        """The text of tokens."""
        if body.model is not None:
            front.check_model(body.model)
        unknown = [token for token in body.tokens if token >= front.served.model.vocab_size]
        if unknown:
            message = f"tokens: {unknown[0]} is not in the vocabulary of {front.served.model.vocab_size}"
            raise ApiError(400, message, param="tokens", code="invalid_value")
        return {"prompt": await front.run(front.tokenizer().decode, body.tokens)}

    return router


def _operation(front: Front, metrics: Callable[[], bytes] | None) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses={503: _ERRORS[503]})
    async def health() -> dict[str, str]:
        """Whether the process works; if not, it must be started anew."""
        if not front.loop.is_healthy:
            raise unavailable("the engine has failed", "engine_failed")
        return {"status": "healthy"}

    @router.get("/ready", responses={503: _ERRORS[503]})
    async def ready() -> dict[str, str]:
        """Whether requests are accepted."""
        if not front.is_ready:
            raise unavailable("the server is going down or has failed", "not_ready")
        return {"status": "ready"}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Of this software."""
        return {"version": _version(), "jax": importlib.metadata.version("jax")}

    if metrics is not None:

        @router.get("/metrics", include_in_schema=False)
        async def prometheus() -> Response:
            return Response(metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _answer(request: Request, opening: Any, stream: bool | None) -> Response:
    """A stream, or the whole answer unless the client leaves first."""
    answer: CompletionAnswer | ChatAnswer = await until_gone(request.receive, opening)
    request.state.told["prompt_tokens"] = answer.generation.num_prompt_tokens
    if stream:
        return EventStream(answer.events(), lambda: _count(request, answer))
    whole = await until_gone(request.receive, answer.whole())
    _count(request, answer)
    return JSONResponse(whole)


def _count(request: Request, answer: CompletionAnswer | ChatAnswer) -> None:
    """For the log."""
    request.state.told["output_tokens"] = answer.generation.num_output_tokens


async def _answer_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log shows it


async def _answer_failure(request: Request, error: Exception) -> JSONResponse:
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error").response()


def _version() -> str:
    try:
        return importlib.metadata.version("sarathi-jax")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "0"


def _docs_page(schema: dict[str, Any]) -> str:
    """The OpenAPI description as a page that needs nothing from elsewhere."""
    sections = []
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            shown = html.escape(json.dumps({k: about[k] for k in ("requestBody", "responses") if k in about}, indent=2))
            text = html.escape(about.get("description", about.get("summary", "")))
            sections.append(
                f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{text}</p>"
                f"<details><summary>Body and answers</summary><pre>{shown}</pre></details></section>"
            )
    for name, about in schema.get("components", {}).get("schemas", {}).items():
        shown = html.escape(json.dumps(about, indent=2))
        sections.append(
            f"<section id='{html.escape(name)}'><details><summary><code>{html.escape(name)}</code></summary>"
            f"<pre>{shown}</pre></details></section>"
        )
    style = "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}pre{overflow:auto}"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>sarathi_jax: API</title>"
        f"<style>{style}</style><h1>sarathi_jax</h1>"
        "<p>An API like OpenAI's. As JSON: <a href=openapi.json>openapi.json</a></p>" + "".join(sections) + "</html>"
    )
