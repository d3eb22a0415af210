"""Connections that do not speak: too many of them, or heads of requests that never end."""

import asyncio
from typing import Any, override

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10


def guarded_protocol(header_timeout_s: float, max_connections: int) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with limits that it lacks.

    Args:
      header_timeout_s: longest time from the beginning of a request, or of the connection, to the end of its head.
      max_connections: further ones are closed at once.
    """

    class Guarded(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _num_head_bytes = 0

        @override
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
            else:
                self._timer = self.loop.call_later(header_timeout_s, transport.abort)

        @override
        def data_received(self, data: bytes) -> None:
            if self._waits and self._timer is None:  # the next request on a connection that is kept alive
                self._timer = self.loop.call_later(header_timeout_s, self.transport.abort)
            super().data_received(data)
            if not self._waits:
                self._stop_timer()
                self._num_head_bytes = 0
                return
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

        @override
        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        @property
        def _waits(self) -> bool:
            """For the head of a request."""
            return self.cycle is None or self.cycle.response_complete

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Guarded
