"""Admission control: whom to refuse now rather than answer too late."""

import collections
import dataclasses
import threading
import time
from collections.abc import Sequence

from sarathi_jax.latency import Backlog, StepTimes, time_to_first_token_s
from sarathi_jax.request import RequestOutput
from sarathi_jax.server.loop import Ask
from sarathi_jax.telemetry.steps import StepRecord


class ReplicaBacklog:
    """An observer of one engine that knows what a new request would find before it there."""

    def __init__(self, times: StepTimes):
        self.times = times
        self._backlog = Backlog()
        self._lock = threading.Lock()
        self._submitted: collections.deque[tuple[float, int]] = collections.deque()

    def on_step(self, record: StepRecord) -> None:
        with self._lock:
            self._backlog = record.state.backlog
            while self._submitted and self._submitted[0][0] < record.scheduled_s:
                self._submitted.popleft()

    def on_end(self, output: RequestOutput) -> None:
        pass

    def add(self, num_tokens: int) -> None:
        """Counts a prompt that no step has seen yet."""
        with self._lock:
            self._submitted.append((time.monotonic(), num_tokens))

    def now(self) -> Backlog:
        """What the last step left, and what came since."""
        with self._lock:
            backlog, submitted = self._backlog, list(self._submitted)
        num_tokens = backlog.num_prefill_tokens + sum(length for _, length in submitted)
        return dataclasses.replace(
            backlog, num_prefill_tokens=num_tokens, num_waiting=backlog.num_waiting + len(submitted)
        )


class Admission:
    """Refuses prompts that would wait longer for their first token than was promised, or find a full queue.

    Args:
      replicas: what each engine has before it; a prompt goes to the one that has the least.
      num_stages: pp.
      max_waiting: prompts that may wait in one engine.
      ttft_slo_ms: longest time to a first token that is promised; None: nothing is.
    """

    def __init__(
        self, replicas: Sequence[ReplicaBacklog], num_stages: int, max_waiting: int, ttft_slo_ms: float | None = None
    ):
        self._replicas = replicas
        self._num_stages = num_stages
        self._max_waiting = max_waiting
        self._ttft_slo_s = None if ttft_slo_ms is None else ttft_slo_ms / 1000

    def __call__(self, asks: Sequence[Ask]) -> float | None:
        """Lets the prompts of a call in, all or none.

        Returns:
          Seconds after which the call should be tried again; None: it is welcome, and counted.
        """
        num_tokens = sum(len(ask.prompt_token_ids) for ask in asks)
        replica = min(self._replicas, key=lambda one: one.now().num_prefill_tokens)
        backlog = replica.now()
        wait_s = time_to_first_token_s(backlog, num_tokens, replica.times, self._num_stages)
        if self._ttft_slo_s is not None and wait_s > self._ttft_slo_s:
            # A prompt that is too long for the promise even alone waits for an idle server.
            alone_s = time_to_first_token_s(Backlog(), num_tokens, replica.times, self._num_stages)
            if alone_s <= self._ttft_slo_s or backlog.num_prefill_tokens or backlog.num_decodes:
                return wait_s - max(self._ttft_slo_s, alone_s)
        if backlog.num_waiting + len(asks) > self._max_waiting + backlog.num_free_rows:
            return wait_s
        for ask in asks:
            replica.add(len(ask.prompt_token_ids))
        return None
