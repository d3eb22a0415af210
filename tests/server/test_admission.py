"""Whom admission control lets in, and when it says to come back."""

import pytest

from sarathi_jax.latency import Backlog, LatencyTable, StepTimes, Timing
from sarathi_jax.request import SamplingParams
from sarathi_jax.scheduling.plan import Chunk, SchedulerState, StepPlan
from sarathi_jax.server.admission import Admission, ReplicaBacklog
from sarathi_jax.server.loop import Ask
from sarathi_jax.telemetry.steps import StepRecord


def replica() -> ReplicaBacklog:
    """1 ms a token of the bucket."""
    return ReplicaBacklog(StepTimes(LatencyTable([Timing(b, d, d, 1 - d, b / 1000) for b in (8, 100) for d in (0, 1)])))


def after_a_step(one: ReplicaBacklog, backlog: Backlog, scheduled_s: float = float("inf")) -> None:
    plan = StepPlan((Chunk(0, 0, 8, True),), 8, 0)
    state = SchedulerState(1, 0, 10, 5, backlog)
    one.on_step(StepRecord(plan, ("a",), scheduled_s, 0.0, 0.0, 0.0, 1, (), (), state))


def asks(*lengths: int) -> list[Ask]:
    return [Ask(str(i), [5] * length, SamplingParams()) for i, length in enumerate(lengths)]


def test_everybody_is_welcome_where_nothing_is_promised():
    admit = Admission([replica()], 1, max_waiting=100)
    assert [admit(asks(1000)) for _ in range(50)] == [None] * 50


def test_a_promise_that_cannot_be_kept_is_not_given():
    one = replica()
    admit = Admission([one], 1, max_waiting=100, ttft_slo_ms=500)
    assert admit(asks(300)) is None
    assert admit(asks(200)) is None
    assert admit(asks(100)) == pytest.approx(0.1), "600 tokens before its first one, 500 are in time"
    after_a_step(one, Backlog(num_prefill_tokens=100, num_free_rows=8))
    assert admit(asks(100)) is None


def test_what_came_since_the_last_step_counts():
    one = replica()
    admit = Admission([one], 1, max_waiting=100, ttft_slo_ms=500)
    assert admit(asks(400)) is None
    after_a_step(one, Backlog(num_free_rows=8), scheduled_s=0.0)  # planned before it came
    assert admit(asks(400)) == pytest.approx(0.3)


def test_a_prompt_too_long_for_the_promise_is_served_when_idle():
    one = replica()
    admit = Admission([one], 1, max_waiting=100, ttft_slo_ms=500)
    assert admit(asks(2000)) is None
    assert admit(asks(2000)) == pytest.approx(2.0)


def test_a_full_queue_refuses():
    one = replica()
    after_a_step(one, Backlog(num_free_rows=0, num_waiting=2, num_decodes=4, num_decode_keys=9, steps_to_free_row=50))
    admit = Admission([one], 1, max_waiting=3)
    assert admit(asks(10)) is None
    wait_s = admit(asks(10))
    assert wait_s is not None
    assert wait_s > 50 * 0.008


def test_the_prompts_of_a_call_come_in_together():
    admit = Admission([replica()], 1, max_waiting=2)
    assert admit(asks(1, 1, 1, 1)) is not None
    assert admit(asks(1, 1, 1)) is None


def test_the_emptier_replica_takes_it():
    first, second = replica(), replica()
    admit = Admission([first, second], 1, max_waiting=9, ttft_slo_ms=500)
    assert [admit(asks(400)) for _ in range(3)][:2] == [None, None]
    assert (first.now().num_prefill_tokens, second.now().num_prefill_tokens) == (400, 400)
