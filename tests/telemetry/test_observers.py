"""Metrics, trace and live view against the steps that they were told of."""

import dataclasses
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sarathi_jax.latency import Backlog, LatencyTable, StepTimes, Timing
from sarathi_jax.request import CompletionOutput, RequestMetrics, RequestOutput
from sarathi_jax.scheduling.plan import Chunk, SchedulerState, StepPlan
from sarathi_jax.telemetry.drift import DriftObserver
from sarathi_jax.telemetry.live import NUM_STEPS, LiveView
from sarathi_jax.telemetry.metrics import Metrics
from sarathi_jax.telemetry.steps import StepRecord
from sarathi_jax.telemetry.trace import TraceWriter


def record(at_s: float = 1.0, tbts_s: tuple[float, ...] = (0.02, 0.03)) -> StepRecord:
    """Two decodes and a chunk of 5 tokens in a bucket of 16, 10 ms long."""
    chunks = (Chunk(0, 9, 1, True), Chunk(1, 4, 1, True), Chunk(2, 0, 5, True))
    return StepRecord(
        plan=StepPlan(chunks, 16, 2, preempted=(7,)),
        request_ids=("a", "", "c"),
        scheduled_s=at_s - 0.002,
        launched_s=at_s - 0.001,
        started_s=at_s,
        ended_s=at_s + 0.01,
        num_drawn=3,
        ttfts_s=(0.2,),
        tbts_s=tbts_s,
        state=SchedulerState(3, 1, 100, 60, Backlog(), 40, 10),
    )


def output(reason="stop") -> RequestOutput:
    metrics = RequestMetrics(arrival_s=0.5, first_scheduled_s=0.9, first_token_s=1.0, finished_s=2.5)
    return RequestOutput("a", None, (1, 2, 3), (CompletionOutput(0, "", (4, 5), finish_reason=reason),), True, metrics)


def samples(text: bytes) -> dict[tuple, float]:
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


@pytest.mark.parametrize(("waited_s", "num_stages", "ratio"), [(0.0, 1, 2.0), (0.0, 2, 1.0), (0.02, 2, 2.0)])
def test_drift_is_a_stage_s(waited_s: float, num_stages: int, ratio: float):
    """A step of 20 ms, tabulated with 10, alone in the pipeline or behind another."""
    times = StepTimes(LatencyTable([Timing(16, d, d, 1 - d, 0.01) for d in (0, 1)]))
    told = dataclasses.replace(record(), launched_s=1.0 - waited_s, started_s=1.0, ended_s=1.02)
    for _ in range(200):
        DriftObserver(times, num_stages).on_step(told)
    assert times.drift == pytest.approx(ratio, rel=0.01)


def test_metrics_count_what_happened():
    metrics = Metrics("tiny")
    times = StepTimes(LatencyTable([Timing(16, d, d, 1 - d, 0.01) for d in (0, 1)]))
    observer = metrics.observer(0, times)
    observer.on_step(record())
    observer.on_step(record(2.0))
    observer.on_end(output())
    observer.on_end(output("abort"))
    metrics.watch_compiles(lambda: 5)
    values = samples(metrics.text())
    assert values["sarathi_ttft_seconds_count",] == 2
    assert values["sarathi_tbt_seconds_count",] == 4
    assert values["sarathi_tbt_seconds_sum",] == pytest.approx(0.1)
    assert values["sarathi_step_seconds_count", "0", "16"] == 2
    assert values["sarathi_step_seconds_sum", "0", "16"] == pytest.approx(0.02)
    assert values["sarathi_step_host_seconds_sum", "0"] == pytest.approx(0.002)
    assert values["sarathi_step_tokens_total", "0", "decode"] == 4
    assert values["sarathi_step_tokens_total", "0", "prefill"] == 10
    assert values["sarathi_step_tokens_total", "0", "padding"] == 18
    assert values["sarathi_output_tokens_total",] == 6
    assert values["sarathi_prompt_tokens_total",] == 6
    assert values["sarathi_preemptions_total", "0"] == 2
    assert values["sarathi_requests_total", "stop"] == values["sarathi_requests_total", "abort"] == 1
    assert values["sarathi_request_seconds_sum",] == pytest.approx(4.0)
    assert values["sarathi_queue_seconds_sum",] == pytest.approx(0.8)
    assert (values["sarathi_running", "0"], values["sarathi_waiting", "0"]) == (3, 1)
    assert (values["sarathi_blocks", "0", "free"], values["sarathi_blocks", "0", "owned"]) == (60, 40)
    assert values["sarathi_bucket_fill", "0"] == 7 / 16
    assert values["sarathi_prefix_cache_tokens", "0", "hit"] == 10
    assert values["sarathi_step_time_drift", "0"] == pytest.approx(1)
    assert values["sarathi_late_compiles",] == 5


def test_a_trace_is_json_that_names_every_request(tmp_path):
    trace = TraceWriter(tmp_path / "trace.json")
    observer = trace.observer(0)
    observer.on_step(record())
    observer.on_end(output())
    trace.close()
    trace.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    bars = {(event["pid"], event["name"]): event for event in events if event["ph"] == "X"}
    step = bars[1, "step of 16"]
    assert (step["ts"], step["dur"]) == (1e6, 1e4)
    assert (step["args"]["decodes"], step["args"]["prefill tokens"], step["args"]["padding"]) == (2, 5, 9)
    assert bars[2, "plan and launch"]["dur"] == 1e3
    names = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert bars[3, "decode"]["tid"] == names["a"]
    assert bars[3, "prefill 5"]["tid"] == names["c"]
    assert (bars[3, "wait"]["ts"], bars[3, "wait"]["dur"]) == (0.5e6, 0.4e6)


def test_what_a_killed_process_left_of_a_trace_can_be_read(tmp_path):
    trace = TraceWriter(tmp_path / "trace.json")
    observer = trace.observer(0)
    for i in range(300):
        observer.on_step(record(i))
    text = (tmp_path / "trace.json").read_text()
    assert len(json.loads(text.rstrip().rstrip(",") + "]")) >= 1000


def test_the_live_view_keeps_the_latest():
    view = LiveView(tbt_slo_ms=50)
    for i in range(NUM_STEPS + 10):
        view.on_step(record(i * 0.01, tbts_s=(i / 1000,)))
    view.on_end(output())
    seen = view.snapshot()
    assert (seen["num_steps"], len(seen["steps"]), seen["tbt_slo_ms"]) == (NUM_STEPS + 10, NUM_STEPS, 50)
    assert seen["steps"][-1] == {"index": NUM_STEPS + 9, "bucket": 16, "decodes": 2, "prefill": 5, "ms": 10.0}
    assert seen["tbt_ms"] == {"count": 250, "p50": 124.0, "p90": 224.0, "p99": 247.0}
    assert seen["totals"]["output_tokens"] == 3 * (NUM_STEPS + 10)
    assert seen["totals"]["requests"] == 1
    assert [step["index"] for step in view.snapshot(since=NUM_STEPS + 8)["steps"]] == [NUM_STEPS + 8, NUM_STEPS + 9]


def test_the_live_view_forgets_what_is_old():
    view = LiveView()
    assert view.snapshot()["tbt_ms"] == {"count": 0}
    view.on_step(record(0.0))
    view.on_step(record(100.0))
    assert view.snapshot()["tbt_ms"]["count"] == 2
