"""Metrics of samples and steps, their tables, and quantiles of what was cut off."""

import csv
import math
import random

import pytest

from sarathi_jax.latency import Backlog
from sarathi_jax.request import CompletionOutput, RequestMetrics, RequestOutput
from sarathi_jax.scheduling.plan import Chunk, SchedulerState, StepPlan
from sarathi_jax.telemetry.definitions import (
    Observations,
    SampleTimes,
    gaps_s,
    keeps_promise,
    latencies,
    quantile,
    samples_of,
    scheduling_delays,
    tbts,
    throughput,
    ttfts,
)
from sarathi_jax.telemetry.steps import StepRecord
from sarathi_jax.telemetry.summary import preemption_times, summarise
from sarathi_jax.telemetry.tables import write_samples, write_steps

DONE = SampleTimes(
    "a",
    arrival_s=1.0,
    token_s=(2.0, 2.5, 4.0),
    first_scheduled_s=1.5,
    finished_s=4.0,
    num_prompt_tokens=7,
    num_preemptions=1,
    preempted_s=1.0,
)
DECODING = SampleTimes("b", arrival_s=2.0, token_s=(3.0, 4.0), first_scheduled_s=2.0, num_prompt_tokens=5)
WAITING = SampleTimes("c", arrival_s=3.0, num_prompt_tokens=9)
LEFT = SampleTimes("d", arrival_s=3.0, given_up_s=4.5)
ALL = [DONE, DECODING, WAITING, LEFT]


def step(
    at_s: float, chunks: list[tuple[int, int, int]], bucket=16, num_decodes=0, preempted=(), ids=None
) -> StepRecord:
    """A step that is planned at that time, launched 0.1 s later, and ends 0.5 s after that."""
    plan = StepPlan(tuple(Chunk(*chunk, samples=True) for chunk in chunks), bucket, num_decodes, preempted)
    return StepRecord(
        plan=plan,
        request_ids=ids or tuple("abc"[chunk[0]] for chunk in chunks),
        scheduled_s=at_s,
        launched_s=at_s + 0.1,
        started_s=at_s + 0.1,
        ended_s=at_s + 0.6,
        num_drawn=len(chunks),
        ttfts_s=(),
        tbts_s=(),
        state=SchedulerState(2, 1, 100, 60, Backlog()),
    )


STEPS = [
    step(1.0, [(0, 0, 10)]),
    step(2.0, [(0, 10, 1), (1, 0, 5)], num_decodes=1),
    step(3.0, [(0, 11, 1)], bucket=2, num_decodes=1, preempted=(1,)),
    step(4.0, [(0, 12, 1), (1, 0, 6)], num_decodes=1),
    step(5.0, [(0, 13, 1)], bucket=2, num_decodes=1, preempted=(1,)),
]


def test_of_one_sample():
    assert DONE.ttft_s == 1.0
    assert DONE.tbts_s == gaps_s(DONE.token_s) == [0.5, 1.5]
    assert DONE.scheduling_delay_s == 0.5
    assert DONE.latency_s == 3.0
    assert DONE.normalised_latency_s == 1.0
    assert DONE.normalised_execution_s == 0.5
    assert DONE.normalised_decode_s == 1.0
    for name in ("ttft_s", "scheduling_delay_s", "latency_s", "normalised_latency_s", "normalised_execution_s"):
        assert getattr(WAITING, name) is None
    assert WAITING.tbts_s == []
    assert SampleTimes("e", 0.0, (1.0,), 0.0, 1.0).normalised_decode_s is None


def test_who_waits_counts_as_longer():
    assert ttfts(ALL, 5.0) == Observations((1.0, 1.0), (2.0, 1.5))
    assert scheduling_delays(ALL, 5.0) == Observations((0.5, 0.0), (2.0, 1.5))
    assert latencies(ALL, 5.0) == Observations((3.0,), (3.0, 2.0, 1.5))
    assert tbts(ALL, 5.0) == Observations((0.5, 1.5, 1.0), (1.0,))
    # Over HTTP nobody sees when a request was scheduled.
    assert scheduling_delays([SampleTimes("e", 0.0, (1.0,))], 5.0) == Observations(())


def test_what_comes_after_the_end_is_not_known():
    assert ttfts(ALL, 2.5) == Observations((1.0,), (0.5,))
    assert latencies(ALL, 2.5) == Observations((), (1.5, 0.5))
    assert tbts(ALL, 2.5) == Observations((0.5,), (0.0,))


def test_quantiles_without_bounds_are_the_nearest_rank():
    values = [float(value) for value in range(1, 101)]
    random.Random(0).shuffle(values)
    assert [quantile(values, share) for share in (0.001, 0.01, 0.5, 0.501, 0.99, 1)] == [1, 1, 50, 51, 99, 100]
    assert quantile([3.0, 3.0, 4.0], 0.5) == 3.0
    assert math.isnan(quantile([], 0.5))
    for share in (0, 1.01, -1, math.nan):
        with pytest.raises(ValueError, match="share above 0"):
            quantile(values, share)


def test_quantiles_with_bounds():
    # Of four one had left at 2; the two that stayed on after it stand for it, too: 1, then 3/4 x 1/2, then 0.
    assert quantile([1.0, 3.0, 4.0], 0.25, [2.0]) == 1.0
    assert quantile([1.0, 3.0, 4.0], 0.6, [2.0]) == 3.0
    assert quantile([1.0, 3.0, 4.0], 0.63, [2.0]) == 4.0
    # Beyond what anybody was watched for nothing is known.
    assert quantile([1.0, 2.0], 0.5, [9.0, 9.0]) == 2.0
    assert quantile([1.0, 2.0], 0.6, [9.0, 9.0]) == math.inf
    assert quantile([], 0.5, [1.0]) == math.inf
    # Of equals the value comes first.
    assert quantile([5.0], 0.5, [5.0]) == 5.0


def test_bounds_give_back_the_quantiles_that_cutting_off_hid():
    generator = random.Random(1)
    true = [generator.expovariate(1.0) for _ in range(20_000)]
    watched = [generator.uniform(0, 4) for _ in true]
    seen = [value for value, limit in zip(true, watched, strict=True) if value <= limit]
    cut = [limit for value, limit in zip(true, watched, strict=True) if value > limit]
    for share in (0.5, 0.9):
        assert quantile(seen, share, cut) == pytest.approx(-math.log(1 - share), rel=0.04)
    assert quantile(seen, 0.9) < 0.85 * -math.log(0.1)


def test_a_promise_is_kept_with_the_delay():
    assert keeps_promise([DONE], 5.0, tbt_slo_s=1.5)
    assert not keeps_promise([DONE], 5.0, tbt_slo_s=1.4)
    assert not keeps_promise([DONE, WAITING, WAITING], 60.0, tbt_slo_s=1.5)


def test_throughput_of_a_time():
    done = throughput(ALL, 0.0, 5.0)
    assert (done.requests_per_s, done.output_tokens_per_s, done.prompt_tokens_per_s) == (0.2, 1.0, 2.4)
    assert throughput(ALL, 2.0, 3.0).output_tokens_per_s == 2
    with pytest.raises(ValueError, match="ends after it begins"):
        throughput(ALL, 5.0, 5.0)


def test_samples_of_an_output():
    metrics = RequestMetrics(1.0, 1.5, 2.0, 6.0, ((2.0, 3.0), (2.5, 6.0)), num_preemptions=2)
    ends = (
        CompletionOutput(0, "", (4, 5), finish_reason="stop"),
        CompletionOutput(1, "", (4, 5), finish_reason="abort"),
    )
    first, second = samples_of(RequestOutput("a", None, (1, 2, 3), ends, True, metrics), preempted_s=0.5)
    assert first == SampleTimes("a", 1.0, (2.0, 3.0), 1.5, 3.0, None, 3, 2, 0.5)
    assert (second.finished_s, second.given_up_s, second.token_s) == (None, 6.0, (2.5, 6.0))
    waiting = RequestOutput("b", None, (1,), (CompletionOutput(0, "", ()),), False, RequestMetrics(1.0, token_s=((),)))
    assert samples_of(waiting) == [SampleTimes("b", 1.0, num_prompt_tokens=1)]


def test_steps_are_summarised():
    summary = summarise(STEPS)
    assert (summary.num_mixed, summary.num_decode_only, summary.num_prefill_only) == (2, 2, 1)
    assert (summary.num_steps, summary.decode_tokens, summary.prefill_tokens, summary.padding_tokens) == (5, 4, 21, 27)
    assert summary.sequences_a_step == 7 / 5
    assert summary.device_s == pytest.approx(2.5)
    assert summary.idle_s == pytest.approx(2.0)
    assert summary.host_s == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no steps"):
        summarise([])


def test_preemption_lasts_until_blocks_are_there_again():
    assert preemption_times(STEPS, 9.0) == {"b": 1.0 + 4.0}
    assert preemption_times(STEPS[:2], 9.0) == {}
    # A request that had ended when its step did is known by its earlier ones.
    ended = [*STEPS[:3], step(4.0, [(1, 0, 6)], ids=("",))]
    assert preemption_times(ended, 9.0) == {"b": 1.0}


def test_tables_are_csv(tmp_path):
    write_samples(tmp_path / "samples.csv", ALL)
    with (tmp_path / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["request_id"] for row in rows] == ["a", "b", "c", "d"]
    assert {name: rows[0][name] for name in ("first_token_s", "num_output_tokens", "ttft_s", "tbt_max_s")} == {
        "first_token_s": "2.0",
        "num_output_tokens": "3",
        "ttft_s": "1.0",
        "tbt_max_s": "1.5",
    }
    assert (rows[2]["ttft_s"], rows[2]["finished_s"], rows[2]["num_prompt_tokens"]) == ("", "", "9")
    write_steps(tmp_path / "steps.csv", STEPS)
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert (rows[1]["decode_tokens"], rows[1]["prefill_tokens"], rows[1]["padding_tokens"]) == ("1", "5", "10")
    assert (rows[2]["num_preempted"], rows[2]["ended_s"]) == ("1", "3.6")
