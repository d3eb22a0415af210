"""Connects everything that watches a server's engines."""

import collections
import dataclasses
from pathlib import Path

from sarathi_jax.loading import Loaded
from sarathi_jax.server.admission import Admission, ReplicaBacklog
from sarathi_jax.telemetry.live import LiveView
from sarathi_jax.telemetry.metrics import Metrics
from sarathi_jax.telemetry.trace import TraceWriter

_REASONS = collections.defaultdict(
    lambda: "other",
    {
        400: "bad request",
        401: "no key",
        404: "not found",
        408: "too slow",
        413: "too large",
        429: "overload",
        503: "not ready",
    },
)


@dataclasses.dataclass(frozen=True)
class Watch:
    """What watches the engines of a server.

    Attributes:
      admission: knows what they have before them.
      trace: None: no trace is written.
    """

    metrics: Metrics
    view: LiveView
    admission: Admission
    trace: TraceWriter | None

    def refused(self, status: int) -> None:
        """Counts an answer that is an error."""
        self.metrics.refusals.labels(_REASONS[status]).inc()

    def close(self) -> None:
        """Ends the trace."""
        if self.trace is not None:
            self.trace.close()


def watch(loaded: Loaded, name: str, max_waiting: int, trace_path: Path | None = None) -> Watch:
    """Observes every engine.

    Args:
      loaded: timed, see `load`.
      name: under which the model is served.
      max_waiting: prompts that may wait in one engine.
      trace_path: file for a trace; None: none.

    Raises:
      OSError: the trace cannot be written.
    """
    engine = loaded.engine_config
    metrics, view = Metrics(name), LiveView(engine.tbt_slo_ms, engine.ttft_slo_ms)
    trace = None if trace_path is None else TraceWriter(trace_path)
    backlogs = []
    for i, replica in enumerate(loaded.replicas):
        assert replica.times is not None
        backlogs.append(ReplicaBacklog(replica.times))
        observers = [backlogs[-1], metrics.observer(i, replica.times), view]
        observers += [] if trace is None else [trace.observer(i, replica.times)]
        for observer in observers:
            replica.engine.observe(observer)
    metrics.watch_compiles(lambda: loaded.num_late_compiles)
    return Watch(metrics, view, Admission(backlogs, engine.pp, max_waiting, engine.ttft_slo_ms), trace)
