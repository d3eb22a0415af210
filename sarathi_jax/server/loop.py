"""The thread that drives the engine: the front hands it requests and aborts, it hands back what every step reports."""

import asyncio
import collections
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from sarathi_jax.request import Request, RequestError, RequestOutput, SamplingParams, StructuredOutputsParams

_log = logging.getLogger(__name__)
_WATCH_EVERY_S = 0.2


class EngineFailedError(Exception):
    """The engine is broken, and so is every request in it; the process must be started anew."""


class Steps(Protocol):
    """What the thread drives: `Engine`, `Replicas`, or a test's."""

    @property
    def has_work(self) -> bool: ...

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        streams: bool = False,
        priority: int = 0,
        slo_ms: float | None = None,
    ) -> Request: ...

    def abort(self, request_id: str) -> RequestOutput | None: ...

    def end_sample(self, request_id: str, index: int, stop: str) -> RequestOutput | None: ...

    def compile_grammar(self, asked: StructuredOutputsParams) -> None: ...

    def step(self) -> list[RequestOutput]: ...


@dataclasses.dataclass(frozen=True)
class Ask:
    """A prompt for the engine; the fields are those of `Engine.add_request`."""

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    streams: bool = False
    priority: int = 0
    slo_ms: float | None = None


class Inbox:
    """What the engine says of the prompts of one call; used in the event loop's thread alone.

    Outputs are cumulative, so only the latest of each request is kept: a reader may be slow.
    """

    def __init__(self):
        self._latest: dict[str, RequestOutput] = {}
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        self._latest[output.request_id] = output
        self._filled.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._filled.set()

    async def take(self) -> list[RequestOutput]:
        """Waits until there is news.

        Raises:
          Exception: whatever `fail` was given.
        """
        await self._filled.wait()
        self._filled.clear()
        outputs, self._latest = list(self._latest.values()), {}
        if self._error is not None:
            if not outputs:
                raise self._error
            self._filled.set()
        return outputs


@dataclasses.dataclass(frozen=True)
class _Submission:
    asks: Sequence[Ask]
    inbox: Inbox
    accepted: asyncio.Future[list[Request]]


_Command = Callable[[], None]


class EngineLoop:
    """Owns the engine.

    Args:
      engine: to drive; nobody else may touch it once `start` was called, except `compile_grammar`.
      step_timeout_s: a step that takes longer is taken for stuck.
      on_failure: called once when the engine has failed, in the thread that noticed it.
    """

    def __init__(self, engine: Steps, *, step_timeout_s: float = 60.0, on_failure: Callable[[], None] | None = None):
        self._engine = engine
        self._step_timeout_s = step_timeout_s
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._commands: collections.deque[_Command] = collections.deque()
        self._stopping = False
        self._step_began_s: float | None = None
        self._failing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._ids = itertools.count()
        # In the event loop's thread alone.
        self._aio: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[str, tuple[Inbox, int]] = {}
        self._pending: set[asyncio.Future[list[Request]]] = set()
        self._num_samples = 0
        self.failure: EngineFailedError | None = None

    @property
    def num_samples(self) -> int:
        """Samples of all prompts that have not ended."""
        return self._num_samples

    @property
    def is_healthy(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    def new_id(self, prefix: str) -> str:
        """A request id that nobody else has."""
        return f"{prefix}.{next(self._ids)}"

    def start(self) -> None:
        """Starts the thread; call it in the event loop."""
        self._aio = asyncio.get_running_loop()
        self._thread.start()
        self._watchdog.start()

    async def stop(self, timeout_s: float = 5.0) -> bool:
        """Ends the thread once its step is over.

        Args:
          timeout_s: longest wait for the step.

        Returns:
          Whether the thread has ended.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def compile_grammar(self, asked: StructuredOutputsParams) -> None:
        """As `Engine.compile_grammar`: any thread may call it, and steps go on meanwhile."""
        self._engine.compile_grammar(asked)

    async def submit(self, asks: Sequence[Ask], inbox: Inbox) -> list[Request]:
        """Hands in the prompts of a call, all or none.

        Returns:
          The requests as accepted.

        Raises:
          RequestError: one cannot be served.
          EngineFailedError: the engine is broken.
        """
        if self.failure is not None:
            raise self.failure
        assert self._aio is not None
        submission = _Submission(asks, inbox, self._aio.create_future())
        for ask in asks:
            self._inboxes[ask.request_id] = inbox, ask.params.n
            self._num_samples += ask.params.n
        self._pending.add(submission.accepted)
        submission.accepted.add_done_callback(self._pending.discard)
        self._send(lambda: self._accept(submission))
        try:
            return await submission.accepted
        except BaseException:
            self.abort([ask.request_id for ask in asks])
            raise

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests before the next step; those that have ended are passed over."""
        live = [request_id for request_id in request_ids if request_id in self._inboxes]
        for request_id in live:
            self._forget(request_id)
        self._send(*[lambda i=i: self._end(i) for i in live])

    def fail_all(self, error: Exception) -> None:
        """Ends all open requests; whoever waits for them gets the error."""
        for future in list(self._pending):
            _resolve(future, None, error)
        for inbox, _ in self._inboxes.values():
            inbox.fail(error)
        self.abort(list(self._inboxes))

    def end_sample(self, request_id: str, index: int, stop: str) -> None:
        """As `Engine.end_sample`, before the next step."""

        def end() -> None:
            output = self._engine.end_sample(request_id, index, stop)
            if output is not None:
                self._call(self._deliver, [output])

        self._send(end)

    def _send(self, *commands: _Command) -> None:
        with self._changed:
            self._commands += commands
            self._changed.notify()

    # In the engine's thread.

    def _run(self) -> None:
        try:
            for commands in self._turns():
                for command in commands:
                    command()
                if self._engine.has_work:
                    self._step_began_s = time.monotonic()
                    outputs = self._engine.step()
                    self._step_began_s = None
                    if outputs:
                        self._call(self._deliver, outputs)
        except Exception as error:  # whatever it is: nobody may wait for an engine that stands still
            _log.exception("the engine failed")
            self._fail(f"{type(error).__name__}: {error}")

    def _turns(self) -> Iterator[list[_Command]]:
        """What is to be done before each step; waits while there is nothing at all."""
        while True:
            with self._changed:
                while not (self._commands or self._stopping or self._engine.has_work):
                    self._changed.wait()
                commands = list(self._commands)
                self._commands.clear()
                if self._stopping and not commands:
                    return
            yield commands

    def _accept(self, submission: _Submission) -> None:
        requests: list[Request] = []
        try:
            for ask in submission.asks:
                request = self._engine.add_request(
                    ask.request_id,
                    ask.prompt_token_ids,
                    ask.params,
                    streams=ask.streams,
                    priority=ask.priority,
                    slo_ms=ask.slo_ms,
                )
                requests.append(request)
        except Exception as error:  # of one call alone: whoever made it gets it, the others go on
            for request in requests:
                self._engine.abort(request.request_id)
            if isinstance(error, RequestError) and len(submission.asks) > 1:
                error = RequestError(f"prompt {len(requests)}: {error}")
            self._call(_resolve, submission.accepted, None, error)
        else:
            self._call(_resolve, submission.accepted, requests, None)

    def _end(self, request_id: str) -> None:
        self._engine.abort(request_id)

    def _watch(self) -> None:
        while self._thread.is_alive():
            began_s = self._step_began_s
            if began_s is not None and time.monotonic() - began_s > self._step_timeout_s:
                self._fail(f"a step did not come back within {self._step_timeout_s:g} s")
                return
            time.sleep(min(_WATCH_EVERY_S, self._step_timeout_s / 4))

    def _fail(self, reason: str) -> None:
        """In the engine's thread or the watchdog's, whichever is first."""
        if self._failing.acquire(blocking=False):
            self._call(self._break, EngineFailedError(f"the engine has failed ({reason}); the server starts anew"))
            if self._on_failure is not None:
                self._on_failure()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Runs a function in the event loop's thread."""
        assert self._aio is not None
        try:
            self._aio.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            _log.debug("nobody listens to the engine any more")

    # In the event loop's thread.

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id][0].put(output)
                if output.finished:
                    self._forget(output.request_id)

    def _forget(self, request_id: str) -> None:
        _, num_samples = self._inboxes.pop(request_id)
        self._num_samples -= num_samples

    def _break(self, failure: EngineFailedError) -> None:
        _log.error(str(failure))
        self.failure = failure
        self.fail_all(failure)


def _resolve(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():  # whoever waited is gone
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
