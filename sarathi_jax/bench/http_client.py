"""Asks an OpenAI-compatible server and notes when each piece of the answer comes."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp

from sarathi_jax.telemetry.definitions import gaps_s

_START_S = 1200.0  # compiling, and timing what was compiled


@dataclasses.dataclass
class Answer:
    """What came back.

    Attributes:
      status: of HTTP; 0 where the connection broke.
      start_s: when the request was sent, on the machine's monotonic clock.
      text: of the first choice.
      token_s: when each piece of text came, or each token where `return_token_ids` was asked for.
      logprobs: of each token the log-probabilities of the likeliest ones by text, where they were asked for.
      finish_reason: None where the answer did not come to its end.
      error: the server's message.
    """

    status: int = 0
    start_s: float = 0.0
    text: str = ""
    token_s: list[float] = dataclasses.field(default_factory=list)
    logprobs: list[dict[str, float]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first piece."""
        return self.token_s[0] - self.start_s if self.token_s else None

    @property
    def tbts_s(self) -> list[float]:
        """Times between two pieces."""
        return gaps_s(self.token_s)


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any] | bytes,
    *,
    leave_after: int | None = None,
    answer: Answer | None = None,
) -> Answer:
    """Streams one completion.

    Args:
      session: open connections.
      url: of the server, without a path.
      body: of ``/v1/completions``, to which streaming is added; bytes are sent as they are.
      leave_after: pieces after which the connection is closed; None: stay to the end.
      answer: filled as it comes, for callers who may cut this off; None: a new one.
    """
    answer = answer or Answer()
    answer.start_s = time.monotonic()
    data = body if isinstance(body, bytes) else json.dumps({**body, "stream": True}).encode()
    headers = {"Content-Type": "application/json"}
    try:
        async with session.post(f"{url}/v1/completions", data=data, headers=headers) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = (await response.text())[:500]
                return answer
            async for event in _events(response):
                if "error" in event:
                    answer.error = str(event["error"])
                    return answer
                _read(answer, event)
                if leave_after is not None and len(answer.token_s) >= leave_after:
                    return answer
    except (TimeoutError, aiohttp.ClientError, ConnectionError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        answer.error = f"no stream of completions as OpenAI's API has them: {type(error).__name__}: {error}"
    return answer


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events up to the end of the stream."""
    async for line in response.content:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


def _read(answer: Answer, event: Mapping[str, Any]) -> None:
    for choice in event["choices"]:
        token_ids = choice.get("token_ids")
        if choice["text"] or choice.get("logprobs") or token_ids:
            # Tokens that wait for a slow reader come together.
            answer.token_s += [time.monotonic()] * (len(token_ids) if token_ids else 1)
        answer.text += choice["text"]
        if choice.get("logprobs"):
            answer.logprobs += choice["logprobs"]["top_logprobs"]
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason


class ServerProcess:
    """``main.py serve`` on a free port of the loopback, for as long as the block lasts.

    Args:
      arguments: flags of the verb.
      log: file for what it prints.
    """

    def __init__(self, arguments: Sequence[str], log: Path):
        binary = Path(sys.executable).with_name("sarathi-jax")
        self._arguments = [str(binary), "serve", "--port=0", *arguments]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.start_s = 0.0

    def __enter__(self) -> Self:
        begin_s = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._arguments, stdout=log, stderr=log)
        while not (found := re.search(rb"http://127\.0\.0\.1:\d+", self._log.read_bytes())):
            if self._process.poll() is not None or time.monotonic() - begin_s > _START_S:
                raise RuntimeError(f"the server did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)
        self.url, self.start_s = found[0].decode(), time.monotonic() - begin_s
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def resident_bytes(self) -> int:
        """Memory that the process holds now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """The server's metrics by name with labels, as Prometheus writes them."""
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}
