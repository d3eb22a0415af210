"""The gate before the application: request ids, keys, sizes and times of bodies, one log line a request."""

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sarathi_jax.server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json"})
"""Served without a key."""

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINGER_S = 1.0
_CLIENT_GONE = 499


@dataclasses.dataclass(frozen=True)
class GateSettings:
    """What is let through.

    Attributes:
      api_keys: one of them is needed, except for `OPEN_PATHS`; empty: none is.
      max_body_bytes: of a request.
      body_timeout_s: longest time for a body to come.
      log_requests: write a line for each request that is let in; refused ones are always logged.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0
    log_requests: bool = True


class Gate:
    """ASGI middleware around everything. It reads a body whole, within its limits, before the application starts.

    Args:
      app: behind it.
      settings: what is let through.
      before_body: called with the path before a body is read; raises `ApiError` where that is in vain.
      refused: told the status of every answer that is an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: GateSettings,
        before_body: Callable[[str], None],
        refused: Callable[[int], None] | None = None,
    ):
        self.num_open = 0
        self._app = app
        self._settings = settings
        self._before_body = before_body
        self._refused = refused
        self._digests = [_digest(key.encode()) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        given = headers.get("x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        told: dict[str, Any] = {"request_id": request_id}
        scope.setdefault("state", {}).update(request_id=request_id, told=told)
        began_s, status = time.monotonic(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self.num_open += 1
        try:
            try:
                self._check_key(scope["path"], headers.get("authorization", b""))
                body = await self._read(scope, headers, receive)
            except ApiError as error:
                await _refuse(error, receive, send_on)
            else:
                await self._app(scope, _replay(body, receive), send_on)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception:
            # The application has answered already, if it could.
            _log.exception("the server failed at a request", extra={"fields": told})
        finally:
            self.num_open -= 1
            self._tell(scope, status, time.monotonic() - began_s, told)

    def _tell(self, scope: Scope, status: int, seconds: float, told: dict[str, Any]) -> None:
        is_error = status >= 400
        if is_error and self._refused is not None:
            self._refused(status)
        if is_error or self._settings.log_requests:
            fields = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4)}
            _log.info("request", extra={"fields": told | fields})

    def _check_key(self, path: str, authorization: bytes) -> None:
        if not self._digests or path in OPEN_PATHS:
            return
        kind, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        # All of them, always: the time tells nothing of the keys.
        known = [hmac.compare_digest(digest, own) for own in self._digests]
        if kind.lower() != b"bearer" or not any(known):
            raise ApiError(401, "give a valid key as Authorization: Bearer KEY", code="invalid_api_key")

    async def _read(self, scope: Scope, headers: dict[str, bytes], receive: Receive) -> bytes:
        most = self._settings.max_body_bytes
        too_large = ApiError(413, f"the body exceeds {most} bytes", code="body_too_large")
        length = headers.get("content-length", b"0")
        if not length.isdigit() or int(length[:20]) > most:
            raise too_large
        has_body = length != b"0" or "transfer-encoding" in headers
        if has_body:
            self._before_body(scope["path"])
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while has_body:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    has_body = message.get("more_body", False)
        except TimeoutError:
            seconds = self._settings.body_timeout_s
            raise ApiError(408, f"the body did not come within {seconds:g} s", code="body_timeout") from None
        return bytes(body)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then what comes behind it: the client's leaving."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Answers without the body: at once, and then takes in what still comes for a moment.

    Closing at once would make the system reset the connection, and some clients would never read the answer.
    """
    answer = error.response()
    answer.headers["connection"] = "close"
    await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
