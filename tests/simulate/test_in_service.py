"""A table corrected by steps whose times are made up."""

import pytest

from sarathi_jax.latency import Backlog, LatencyTable, Timing, Work
from sarathi_jax.scheduling.plan import Chunk, SchedulerState, StepPlan
from sarathi_jax.simulate.in_service import in_service
from sarathi_jax.telemetry.steps import StepRecord

TABLE = LatencyTable(
    [Timing(b, 1, keys, 0, b * 1e-3) for b in (8, 64) for keys in (0, 999)]
    + [Timing(b, 0, 0, keys, b * 1e-3) for b in (8, 64) for keys in (0, 999)]
)
DECODE, PROMPT = StepPlan((Chunk(0, 9, 1, True),), 8, 1), StepPlan((Chunk(1, 0, 60, True),), 64, 0)
STATE = SchedulerState(1, 0, 9, 9, Backlog())


def records(plans: list[StepPlan], factor: dict[int, float], gap_s: float = 0.0, host_s: float = 0.0):
    """Steps one after the other, each planned before the last one ends, or `gap_s` after it."""
    steps, ended_s = [], 0.0
    for plan in plans:
        scheduled_s = ended_s + gap_s if gap_s else ended_s - 1e-4
        started_s = max(scheduled_s + host_s, ended_s)
        times = (scheduled_s, started_s, started_s, started_s + factor[plan.bucket] * plan.bucket * 1e-3)
        steps.append(StepRecord(plan, ("0",), *times, 1, (), (), STATE))
        ended_s = times[-1]
    return steps


def test_each_bucket_by_its_own_steps():
    corrected = in_service(TABLE, records([DECODE, PROMPT] * 10, {8: 1.5, 64: 1.2}))
    assert corrected.step_s(Work(8, 1, 10)) == pytest.approx(0.012)
    assert corrected.step_s(Work(64, num_prefill_keys=100)) == pytest.approx(0.064 * 1.2)
    assert corrected.idle_s == 0


def test_too_few_steps_go_by_those_like_them():
    corrected = in_service(TABLE, records([DECODE] * 10 + [PROMPT], {8: 1.5, 64: 3.0}))
    assert corrected.step_s(Work(64, 1, 10)) == pytest.approx(0.064 * 1.5), "a step of decodes like the others"


def test_a_step_that_finds_the_device_idle_waits_for_its_planning():
    busy = records([DECODE] * 10, {8: 1.0})
    late = records([DECODE] * 3, {8: 1.0}, gap_s=0.1, host_s=0.002)
    shift_s = busy[-1].ended_s
    moved = [
        StepRecord(
            s.plan,
            s.request_ids,
            *(at_s + shift_s for at_s in (s.scheduled_s, s.launched_s, s.started_s, s.ended_s)),
            1,
            (),
            (),
            STATE,
        )
        for s in late
    ]
    corrected = in_service(TABLE, busy + moved)
    assert corrected.idle_s == pytest.approx(0.002)
    assert corrected.step_s(Work(8, 1, 10)) == pytest.approx(0.008)


def test_a_quick_step_waits_for_the_planning_of_the_next():
    """Planned while a step of 8 ms runs, launched 3 ms after its end."""
    corrected = in_service(TABLE, records([DECODE] * 10, {8: 1.0}, host_s=0.0031))
    assert corrected.step_s(Work(8, 1, 10)) == pytest.approx(0.011)


def test_without_overlap_every_step_waits():
    corrected = in_service(TABLE, records([DECODE] * 10, {8: 1.25}, gap_s=1e-9, host_s=0.001))
    assert corrected.step_s(Work(8, 1, 10)) == pytest.approx(0.010)
    assert corrected.idle_s == pytest.approx(0.001)


def test_no_steps_change_nothing():
    assert in_service(TABLE, []) is TABLE
