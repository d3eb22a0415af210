"""The life of a server: it listens, serves, drains on a signal, and ends with a status that says why."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from fastapi import APIRouter

from sarathi_jax.config import ConfigError
from sarathi_jax.loading import Loaded
from sarathi_jax.server.app import create_app
from sarathi_jax.server.chat import PLAIN_TEMPLATE
from sarathi_jax.server.config import ServerConfig
from sarathi_jax.server.connections import guarded_protocol
from sarathi_jax.server.errors import unavailable
from sarathi_jax.server.front import Admit, Front, Limits, Served
from sarathi_jax.server.gate import Gate, GateSettings
from sarathi_jax.server.loop import EngineLoop
from sarathi_jax.tokenizer import Tokenizer

EXIT_BROKEN = 70
"""Status of a server whose engine has failed: it should be started anew."""

_log = logging.getLogger(__name__)
_ANSWER_S = 2.0  # for the last answers to leave
_HARD_EXIT_S = 8.0
_SEND_BYTES = 128 << 10


def bind(config: ServerConfig) -> socket.socket:
    """Takes the port, before anything slow is done; nobody is listened to yet.

    Raises:
      ConfigError: it cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, socket.SOCK_STREAM)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Of each connection: who does not read is noticed before megabytes are kept for him.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        taken.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {config.host} port {config.port}: {reason}; choose another") from None
    return taken


def serve(
    loaded: Loaded,
    config: ServerConfig,
    taken: socket.socket,
    *,
    announce: Callable[[str], None],
    admit: Admit | None = None,
    metrics: Callable[[], bytes] | None = None,
    refused: Callable[[int], None] | None = None,
    routers: Sequence[APIRouter] = (),
) -> int:
    """Serves a model until a signal comes or its engine fails.

    Args:
      loaded: the model.
      config: how.
      taken: the socket, of `bind`.
      announce: called with the URL once requests are accepted.
      admit: as of `Front`.
      metrics: as of `create_app`.
      refused: as of `create_app`.
      routers: as of `create_app`.

    Returns:
      Exit status: 0 after a drain. A broken engine ends the process at once with `EXIT_BROKEN`.

    Raises:
      ConfigError: the chat template cannot be read.
    """
    names = tuple(config.served_model_name) or (loaded.path.resolve().name,)
    cache = loaded.cache_config
    served = Served(names, loaded.model_config, cache.max_model_len, _with_template(loaded.tokenizer, config))
    life = _Life(loaded, config, served, taken, announce)
    loop_factory = uvicorn.Config("", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        status = runner.run(life.live(admit, {"metrics": metrics, "refused": refused, "routers": routers}))
    if not life.ended_well:  # a thread is stuck in the device, and would keep the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


class _Server(uvicorn.Server):
    """uvicorn's server without its own idea of signals."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]):
        super().__init__(config)
        self._started = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()


class _Life:
    """One run of a server."""

    def __init__(
        self,
        loaded: Loaded,
        config: ServerConfig,
        served: Served,
        taken: socket.socket,
        announce: Callable[[str], None],
    ):
        self.ended_well = False
        self._loaded = loaded
        self._config = config
        self._served = served
        self._socket = taken
        self._announce = announce
        self._broken = False
        self._ending: asyncio.Task[None] | None = None

    async def live(self, admit: Admit | None, app: dict[str, Any]) -> int:
        config, self._aio = self._config, asyncio.get_running_loop()
        loop = EngineLoop(self._loaded.engine(), step_timeout_s=config.step_timeout_s, on_failure=self._engine_failed)
        limits = Limits(config.max_concurrent_requests, config.request_timeout_s)
        self._front = Front(loop, self._served, limits, admit)
        gate = GateSettings(tuple(config.api_key), config.max_body_bytes, config.body_timeout_s, config.log_requests)
        self._gate: Gate = create_app(self._front, gate, **app)
        self._server = _Server(
            uvicorn.Config(
                self._gate,
                http=guarded_protocol(config.header_timeout_s, config.write_timeout_s, config.max_connections),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=max(1, round(config.keep_alive_s)),
                timeout_graceful_shutdown=max(1, round(_ANSWER_S)),
            ),
            self._started,
        )
        loop.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._aio.add_signal_handler(number, self._signalled, number)
        await self._server.serve([self._socket])
        if self._broken:
            return EXIT_BROKEN
        self.ended_well = await loop.stop()
        self._loaded.close()
        return 0

    def _started(self) -> None:
        host, port = self._socket.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        _log.info("ready", extra={"fields": {"url": url, "model": self._served.names[0]}})
        self._announce(url)

    def _signalled(self, number: int) -> None:
        if self._ending is not None:  # somebody is impatient
            os._exit(128 + number)
        self._ending = asyncio.ensure_future(self._drain(signal.Signals(number).name))

    async def _drain(self, why: str) -> None:
        """Lets what runs finish, refuses what is new, and ends the server."""
        fields = {"why": why, "samples": self._front.loop.num_samples, "timeout_s": self._config.drain_timeout_s}
        _log.info("draining", extra={"fields": fields})
        self._front.is_draining = True
        if not await self._quiet(self._config.drain_timeout_s):
            _log.warning("some requests did not finish in time")
            self._front.loop.fail_all(unavailable("the server went down before the answer was complete", "draining"))
            await self._quiet(_ANSWER_S)
        self._server.should_exit = True

    async def _quiet(self, timeout_s: float) -> bool:
        """Waits until no answer is under way; whether that came in time."""
        ends_s = time.monotonic() + timeout_s
        while self._front.loop.num_samples or self._gate.num_open:
            if time.monotonic() > ends_s:
                return False
            await asyncio.sleep(0.02)
        return True

    def _engine_failed(self) -> None:
        """In the thread that noticed it: the process ends, whatever else hangs."""
        timer = threading.Timer(_HARD_EXIT_S, os._exit, (EXIT_BROKEN,))
        timer.daemon = True
        timer.start()
        self._aio.call_soon_threadsafe(self._break)

    def _break(self) -> None:
        self._broken = True
        self._front.is_draining = True

        async def end() -> None:
            await self._quiet(_ANSWER_S)
            self._server.should_exit = True

        self._ending = asyncio.ensure_future(end())


def _with_template(tokenizer: Tokenizer | None, config: ServerConfig) -> Tokenizer | None:
    """The tokenizer with the chat template that is asked for, or with one in plain words if it has none."""
    if tokenizer is None:
        return None
    if config.chat_template is not None:
        try:
            return tokenizer.with_chat_template(config.chat_template.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read chat_template={config.chat_template}: {error}") from None
    return tokenizer if tokenizer.has_chat_template else tokenizer.with_chat_template(PLAIN_TEMPLATE)
