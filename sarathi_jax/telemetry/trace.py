"""A trace of every step in the format of Chrome, which Perfetto (ui.perfetto.dev) draws.

Three groups of tracks: what the device did, what the host did, and one track a request with its waiting, its chunks and
its decodes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sarathi_jax.latency import StepTimes
from sarathi_jax.request import RequestOutput
from sarathi_jax.telemetry.run import Run
from sarathi_jax.telemetry.steps import StepRecord

_DEVICE, _HOST, _REQUESTS = 1, 2, 3
_EVENTS_AT_ONCE = 512


class TraceWriter:
    """Writes events as they come; a file that was cut off is readable up to there.

    Args:
      path: of the file, written anew.

    Raises:
      OSError: it cannot be written.
    """

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._pending: list[str] = []
        self._tracks: dict[str, int] = {}
        for group, name in ((_DEVICE, "device"), (_HOST, "host"), (_REQUESTS, "requests")):
            self._add({"name": "process_name", "ph": "M", "pid": group, "args": {"name": name}})

    def observer(self, replica: int, times: StepTimes | None = None) -> "ReplicaTrace":
        """Who traces one replica's engine; arguments as of `Metrics.observer`."""
        return ReplicaTrace(self, replica, times)

    def close(self) -> None:
        """Ends the file; safe to call twice."""
        if not self._file.closed:
            self._flush()
            self._file.write('{"name": "end", "ph": "i", "ts": 0, "pid": 1, "tid": 0, "s": "g"}\n]\n')
            self._file.close()

    def slice(self, group: int, track: int, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """Adds a bar."""
        times = {"ts": round(start_s * 1e6, 1), "dur": round(max(end_s - start_s, 0) * 1e6, 1)}
        self._add({"name": name, "ph": "X", **times, "pid": group, "tid": track, "args": args})

    def wait(self, request_id: str, arrival_s: float, started_s: float | None) -> None:
        """Adds a request's wait for its first step; None: it had not waited to an end."""
        track = self.track_of(request_id)
        if started_s is not None:
            self.slice(_REQUESTS, track, "wait", arrival_s, started_s)

    def track_of(self, request_id: str) -> int:
        """The track of a request, named after it."""
        if request_id not in self._tracks:
            self._tracks[request_id] = track = len(self._tracks) + 1
            name = {"name": request_id}
            self._add({"name": "thread_name", "ph": "M", "pid": _REQUESTS, "tid": track, "args": name})
        return self._tracks[request_id]

    def _add(self, event: dict[str, Any]) -> None:
        if self._file.closed:
            return
        self._pending.append(json.dumps(event) + ",\n")
        if len(self._pending) >= _EVENTS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._file.write("".join(self._pending))
        self._file.flush()
        self._pending.clear()


class ReplicaTrace:
    """An observer of one engine: see `TraceWriter.observer`."""

    def __init__(self, trace: TraceWriter, replica: int, times: StepTimes | None):
        self._trace = trace
        self._replica = replica
        self._times = times

    def on_step(self, record: StepRecord) -> None:
        plan = record.plan
        args: dict[str, Any] = {
            "bucket": plan.bucket,
            "decodes": plan.num_decodes,
            "prefill tokens": plan.num_tokens - plan.num_decodes,
            "padding": plan.bucket - plan.num_tokens,
            "preempted": len(plan.preempted),
            "running": record.state.num_running,
            "waiting": record.state.num_waiting,
            "free blocks": record.state.num_free_blocks,
        }
        if self._times is not None:
            args["expected ms"] = round(1e3 * self._times.expected_s(plan.work), 2)
        span = record.started_s, record.ended_s
        self._trace.slice(_DEVICE, self._replica, f"step of {plan.bucket}", *span, **args)
        self._trace.slice(_HOST, self._replica, "plan and launch", record.scheduled_s, record.launched_s)
        for request_id, name, tokens in _chunks(record):
            self._trace.slice(_REQUESTS, self._trace.track_of(request_id), name, *span, tokens=tokens)

    def on_end(self, output: RequestOutput) -> None:
        metrics = output.metrics
        self._trace.wait(output.request_id, metrics.arrival_s, metrics.first_scheduled_s or metrics.finished_s)


def write_trace(path: Path, run: Run) -> None:
    """Writes the trace of a run that is over.

    Args:
      path: of the file, written anew.
      run: whose steps are known.

    Raises:
      OSError: it cannot be written.
    """
    trace = TraceWriter(path)
    try:
        for sample in run.samples:
            trace.wait(sample.request_id, sample.arrival_s, sample.first_scheduled_s)
        for replica, steps in enumerate(run.steps):
            observer = trace.observer(replica)
            for step in steps:
                observer.on_step(step)
    finally:
        trace.close()


def _chunks(record: StepRecord) -> Iterator[tuple[str, str, int]]:
    """Of each chunk of a live request: whose, what it is called, how many tokens."""
    for i, (chunk, request_id) in enumerate(zip(record.plan.chunks, record.request_ids, strict=True)):
        if request_id:
            name = "decode" if i < record.plan.num_decodes else f"prefill {chunk.length}"
            yield request_id, name, chunk.length
