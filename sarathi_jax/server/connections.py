"""Connections that do not speak or do not listen: too many of them, heads that never end, answers that nobody takes."""

import asyncio
from typing import Any, override

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10


def guarded_protocol(header_timeout_s: float, write_timeout_s: float, max_connections: int) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with limits that it lacks.

    Args:
      header_timeout_s: longest time from the beginning of a request, or of the connection, to the end of its head.
      write_timeout_s: longest time in which the system need not take further bytes, because the client does not. The
        connection is then closed, as if the client had left.
      max_connections: further ones are closed at once.
    """

    class Guarded(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None
        _num_head_bytes = 0

        @override
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # Whatever the system does not take at once counts, be it the last bytes of a connection that is closing.
            transport.set_write_buffer_limits(0)
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
        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_writing()

        @override
        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_write_timer()

        @override
        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._stop_write_timer()
            super().connection_lost(exc)

        @property
        def _waits(self) -> bool:
            """For the head of a request."""
            return self.cycle is None or self.cycle.response_complete

        def _watch_writing(self) -> None:
            self._stop_write_timer()
            num_bytes = self.transport.get_write_buffer_size()
            self._write_timer = self.loop.call_later(write_timeout_s, self._check_writing, num_bytes)

        def _check_writing(self, num_bytes: int) -> None:
            """Nothing is added meanwhile, so a client that takes in anything makes the buffer smaller."""
            if self.transport.get_write_buffer_size() < num_bytes:
                self._watch_writing()
            else:
                self.transport.abort()

        def _stop_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Guarded
