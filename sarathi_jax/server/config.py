"""How the server is operated; every field is a flag of `serve`."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from sarathi_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where the server listens and what it lets in.

    Attributes:
      host: address to listen on; 0.0.0.0 is every one of this machine.
      port: to listen on; 0 takes a free one.
      served_model_name: the name of the model in the API, repeated for further names; none: the name of its folder.
      api_key: a key that clients must send as "Authorization: Bearer KEY", repeated for further keys; none: whoever
        reaches the port may use it. A --flagfile keeps keys out of the list of processes.
      chat_template: file with a Jinja chat template in place of the model's own; none: the model's own, or else a
        dialogue in plain words.
      max_concurrent_requests: samples (prompts times n) that may run or wait at once; more are refused with 429.
      max_waiting: prompts that may wait for a place in one engine; more are refused with 429, and with the time after
        which to try again by the measured step times.
      max_connections: connections at once; more are closed.
      max_body_bytes: of a request; a longer one is refused with 413 before it is read.
      header_timeout_s: longest time for the head of a request to come.
      body_timeout_s: longest time for the body of a request to come.
      write_timeout_s: a client that takes in next to nothing of its answer for so long counts as gone: its connection
        is closed and its requests end.
      keep_alive_s: how long an idle connection stays open.
      request_timeout_s: longest time from a request's acceptance to the end of its answer.
      step_timeout_s: a step of the engine that takes longer counts as stuck: open requests get 503, and the server
        ends with status 70, so that whoever supervises it starts it anew.
      drain_timeout_s: how long requests may go on after SIGTERM or SIGINT.
      log_requests: write a log line for every request, not only for refused ones.
      trace_path: file for a trace of every step and request, which ui.perfetto.dev draws; none: no trace is written.

    Raises:
      ConfigError: a value that makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: Sequence[str] = ()
    api_key: Sequence[str] = ()
    chat_template: Path | None = None
    max_concurrent_requests: int = 256
    max_waiting: int = 128
    max_connections: int = 768
    max_body_bytes: int = 4 << 20
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 30.0
    request_timeout_s: float = 600.0
    step_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    log_requests: bool = True
    trace_path: Path | None = None

    def __post_init__(self):
        if self.port not in range(65536):
            raise ConfigError(f"port={self.port} must lie between 0 and 65535")
        for name in ("max_concurrent_requests", "max_waiting", "max_connections", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_s") and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field.name}={value} must be a positive number of seconds")
        if not all(self.api_key):
            raise ConfigError("api_key must not be empty: give a key, or leave it out")
