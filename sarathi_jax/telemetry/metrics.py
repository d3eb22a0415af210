"""Prometheus metrics of the engines and of the requests that were refused before they reached one."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sarathi_jax.latency import StepTimes
from sarathi_jax.request import RequestOutput
from sarathi_jax.telemetry.steps import StepRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)
_REQUEST_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 7.5, 10, 20, 30, 60, 120, 300)


class Metrics:
    """All metrics of a server, in a registry of their own.

    Args:
      model: name under which it is served.
    """

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        self._info = self._gauge("model_info", "1, with the name of the model that is served.", ["model"])
        self._info.labels(model).set(1)
        self.ttft = self._histogram("ttft_seconds", "From a request's arrival to its first token.", _REQUEST_S)
        self.tbt = self._histogram("tbt_seconds", "Between two tokens of a request.", _STEP_S)
        self.e2e = self._histogram("request_seconds", "From a request's arrival to its end.", _REQUEST_S)
        self.queueing = self._histogram("queue_seconds", "From a request's arrival to its first step.", _REQUEST_S)
        self.steps = self._histogram("step_seconds", "Of the device, for a step.", _STEP_S, ["replica", "bucket"])
        self.host = self._histogram("step_host_seconds", "Planning, packing, launching a step.", _STEP_S, ["replica"])
        self.step_tokens = self._counter("step_tokens", "Computed in steps.", ["replica", "kind"])
        self.prompt_tokens = self._counter("prompt_tokens", "Of requests that ended.")
        self.output_tokens = self._counter("output_tokens", "Drawn.")
        self.preemptions = self._counter("preemptions", "Times that a sequence lost its blocks.", ["replica"])
        self.requests = self._counter("requests", "That ended, by how.", ["reason"])
        self.refusals = self._counter("refusals", "Requests that were not accepted, by why.", ["reason"])
        self.running = self._gauge("running", "Sequences that own a row.", ["replica"])
        self.waiting = self._gauge("waiting", "Sequences that wait for one.", ["replica"])
        self.blocks = self._gauge("blocks", "Of the KV cache, by state.", ["replica", "state"])
        self.budget = self._gauge("token_budget", "Bucket of the last step, in tokens.", ["replica"])
        self.fill = self._gauge("bucket_fill", "Share of the last step's bucket that is not padding.", ["replica"])
        self.drift = self._gauge("step_time_drift", "Step times now over those of the latency table.", ["replica"])
        self.prefix = self._gauge("prefix_cache_tokens", "Prompt tokens looked up, and found.", ["replica", "kind"])
        self.late_compiles = self._gauge("late_compiles", "Programs compiled after start: anything but 0 is a bug.")

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def observer(self, replica: int, times: StepTimes | None = None) -> "ReplicaMetrics":
        """Who fills them from one replica's engine.

        Args:
          replica: its index.
          times: its expected step times, if it has any.
        """
        return ReplicaMetrics(self, str(replica), times)

    def watch_compiles(self, count: Callable[[], int]) -> None:
        """Reads the number of late compiles whenever somebody asks for the metrics."""
        self.late_compiles.set_function(count)

    def _histogram(self, name: str, text: str, edges: tuple[float, ...], labels: list[str] | None = None) -> Histogram:
        return Histogram(f"sarathi_{name}", text, labels or [], registry=self.registry, buckets=edges)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"sarathi_{name}", text, labels or [], registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(f"sarathi_{name}", text, labels or [], registry=self.registry)


class ReplicaMetrics:
    """An observer of one engine: see `Metrics.observer`."""

    def __init__(self, metrics: Metrics, replica: str, times: StepTimes | None):
        self._metrics = metrics
        self._replica = replica
        self._times = times

    def on_step(self, record: StepRecord) -> None:
        m, replica, plan, state = self._metrics, self._replica, record.plan, record.state
        m.steps.labels(replica, str(plan.bucket)).observe(record.duration_s)
        m.host.labels(replica).observe(record.host_s)
        num_tokens = plan.num_tokens
        for kind, number in (
            ("decode", plan.num_decodes),
            ("prefill", num_tokens - plan.num_decodes),
            ("padding", plan.bucket - num_tokens),
        ):
            m.step_tokens.labels(replica, kind).inc(number)
        for seconds in record.ttfts_s:
            m.ttft.observe(seconds)
        for seconds in record.tbts_s:
            m.tbt.observe(seconds)
        m.output_tokens.inc(record.num_drawn)
        m.preemptions.labels(replica).inc(len(plan.preempted))
        m.running.labels(replica).set(state.num_running)
        m.waiting.labels(replica).set(state.num_waiting)
        m.blocks.labels(replica, "free").set(state.num_free_blocks)
        m.blocks.labels(replica, "owned").set(state.num_blocks - state.num_free_blocks)
        m.budget.labels(replica).set(plan.bucket)
        m.fill.labels(replica).set(num_tokens / plan.bucket)
        m.prefix.labels(replica, "queried").set(state.num_prefix_queries)
        m.prefix.labels(replica, "hit").set(state.num_prefix_hits)
        if self._times is not None:
            m.drift.labels(replica).set(self._times.drift)

    def on_end(self, output: RequestOutput) -> None:
        m, metrics = self._metrics, output.metrics
        m.prompt_tokens.inc(len(output.prompt_token_ids))
        reasons = [sample.finish_reason for sample in output.outputs]
        m.requests.labels("abort" if "abort" in reasons else str(reasons[0])).inc()
        if metrics.finished_s is not None:
            m.e2e.observe(metrics.finished_s - metrics.arrival_s)
        if metrics.first_scheduled_s is not None:
            m.queueing.observe(metrics.first_scheduled_s - metrics.arrival_s)
