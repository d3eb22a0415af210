"""A table corrected by steps whose times are made up."""

import dataclasses

import pytest

from sarathi_jax.latency import Backlog, LatencyTable, Timing, Work
from sarathi_jax.scheduling.plan import Chunk, SchedulerState, StepPlan
from sarathi_jax.simulate.in_service import ServedStep, in_service
from sarathi_jax.telemetry.definitions import SampleTimes
from sarathi_jax.telemetry.run import Run
from sarathi_jax.telemetry.steps import StepRecord

TABLE = LatencyTable(
    [Timing(b, 1, keys, 0, b * 1e-3) for b in (8, 64) for keys in (0, 999)]
    + [Timing(b, 0, 0, keys, b * 1e-3) for b in (8, 64) for keys in (0, 999)]
)
DECODE, PROMPT = Work(8, 1, 10), Work(64, num_prefill_keys=60)
STATE = SchedulerState(1, 0, 4, 3, Backlog())


def served(works: list[Work], factor: dict[int, float], gap_s: float = 0.0, host_s: float = 0.0) -> list[ServedStep]:
    """Steps one after the other, each planned before the last one ends, or `gap_s` after it."""
    steps, ended_s = [], 0.0
    for work in works:
        scheduled_s = ended_s + gap_s if gap_s else ended_s - 1e-4
        started_s = max(scheduled_s + host_s, ended_s)
        ended_s = started_s + factor[work.num_tokens] * work.num_tokens * 1e-3
        steps.append(ServedStep(work, scheduled_s, started_s, ended_s))
    return steps


def one_after_the_other(steps: list[ServedStep], others: list[ServedStep]) -> list[ServedStep]:
    """One run of two."""
    return steps + [
        ServedStep(
            step.work,
            *(
                None if at_s is None else steps[-1].ended_s + at_s
                for at_s in (step.scheduled_s, step.started_s, step.ended_s, step.asked_s)
            ),
        )
        for step in others
    ]


def test_each_bucket_by_its_own_steps():
    corrected = in_service(TABLE, [served([DECODE, PROMPT] * 10, {8: 1.5, 64: 1.2})])
    assert corrected.step_s(DECODE) == pytest.approx(0.012)
    assert corrected.step_s(Work(64, num_prefill_keys=100)) == pytest.approx(0.064 * 1.2)
    assert corrected.idle_s == 0


def test_too_few_steps_go_by_those_like_them():
    corrected = in_service(TABLE, [served([DECODE] * 10 + [PROMPT], {8: 1.5, 64: 3.0})])
    assert corrected.step_s(Work(64, 1, 10)) == pytest.approx(0.064 * 1.5), "a step of decodes like the others"


def test_few_and_many_decodes_are_corrected_apart():
    timings = [Timing(8, 1, 9, 0, 0.002), Timing(8, 8, 72, 0, 0.008), Timing(8, 0, 0, 9, 0.008)]
    few, some, many = Work(8, 1, 9), Work(8, 4, 36), Work(8, 8, 72)
    runs = [served([few] * 20, {8: 0.25}), served([many] * 20, {8: 1.5})]
    corrected = in_service(LatencyTable(timings), runs)
    assert corrected.step_s(few) == pytest.approx(0.002, rel=0.01)
    assert corrected.step_s(many) == pytest.approx(0.012, rel=0.01)
    assert corrected.step_s(some) == pytest.approx(0.002 + 0.010 * 3 / 7, rel=0.01)


def test_the_steps_of_all_runs_count_alike():
    """Each run on a clock of its own; the first step of each has none before it."""
    corrected = in_service(TABLE, [served([DECODE] * 31, {8: 1.0}), served([DECODE] * 11, {8: 2.0})])
    assert corrected.step_s(DECODE) == pytest.approx(0.008 * (30 * 1.0 + 10 * 2.0) / 40)


def test_a_step_that_finds_the_device_idle_waits_for_its_planning():
    busy = served([DECODE] * 10, {8: 1.0})
    corrected = in_service(TABLE, [one_after_the_other(busy, served([DECODE] * 3, {8: 1.0}, gap_s=0.1, host_s=0.002))])
    assert corrected.idle_s == pytest.approx(0.002)
    assert corrected.step_s(DECODE) == pytest.approx(0.008)


def test_waking_up_counts_from_when_the_request_came():
    busy, late = served([DECODE] * 10, {8: 1.0}), served([DECODE] * 3, {8: 1.0}, gap_s=0.1, host_s=0.002)
    late = [dataclasses.replace(step, asked_s=step.scheduled_s - 0.005) for step in late]
    steps = one_after_the_other(busy, late)
    assert in_service(TABLE, [steps]).idle_s == pytest.approx(0.007)
    steps = [dataclasses.replace(step, asked_s=None if step.asked_s is None else 0.0) for step in steps]
    assert in_service(TABLE, [steps]).idle_s == pytest.approx(0.102), "at most from the end of the step before"


def test_steps_know_when_their_requests_came():
    plans = [StepPlan((Chunk(i, 4, 1, True),), 8, 1) for i in range(2)]
    steps = [
        StepRecord(plan, ("",), at_s, at_s, at_s, at_s + 0.5, 1, (), (), STATE) for at_s, plan in enumerate(plans, 1)
    ]
    samples = [SampleTimes(str(at_s), at_s, first_scheduled_s=1.0) for at_s in (0.25, 0.75)]
    run = Run((*samples, SampleTimes("waits", 1.0)), 2.5, (tuple(steps),))
    assert ServedStep.of_run(run) == [
        [ServedStep(plans[0].work, 1, 1, 1.5, 0.25), ServedStep(plans[1].work, 2, 2, 2.5, None)]
    ]


def test_a_quick_step_waits_for_the_planning_of_the_next():
    """Planned while a step of 8 ms runs, launched 3 ms after its end."""
    corrected = in_service(TABLE, [served([DECODE] * 10, {8: 1.0}, host_s=0.0031)])
    assert corrected.step_s(DECODE) == pytest.approx(0.011)


def test_without_overlap_every_step_waits():
    corrected = in_service(TABLE, [served([DECODE] * 10, {8: 1.25}, gap_s=1e-9, host_s=0.001)])
    assert corrected.step_s(DECODE) == pytest.approx(0.010)
    assert corrected.idle_s == pytest.approx(0.001)


def test_how_steps_scatter_is_kept():
    quick, slow = (served([DECODE] * 26, {8: factor}) for factor in (1.0, 2.0))
    corrected = in_service(TABLE, [one_after_the_other(quick, slow)])
    excess_s = corrected.excess_s(DECODE)
    assert sum(excess_s) == pytest.approx(0, abs=1e-5)
    assert {round(corrected.step_s(DECODE) + more_s, 5) for more_s in excess_s} >= {0.008, 0.016}
    assert corrected.excess_s(PROMPT) == excess_s, "without steps of its own, by all others"


def test_a_slower_run_is_no_scatter():
    corrected = in_service(TABLE, [served([DECODE] * 26, {8: factor}) for factor in (1.0, 2.0)])
    assert corrected.step_s(DECODE) == pytest.approx(0.012)
    assert set(corrected.excess_s(DECODE)) == {0.0}


def test_what_rests_on_decodes_and_prompts_is_corrected_by_both():
    """A short prompt lies between an empty step, which decodes tell, and a longer prompt."""
    timings = [timing for timing in TABLE.timings if timing.num_decodes or timing.num_prefill_keys]
    short, long = Work(64, num_prefill_keys=200), Work(64, num_prefill_keys=900)
    corrected = in_service(LatencyTable(timings), [served([DECODE, short, long] * 10, {8: 0.5, 64: 1.3})])
    assert corrected.step_s(DECODE) == pytest.approx(0.004)
    assert corrected.step_s(short) + corrected.step_s(long) == pytest.approx(2 * 0.064 * 1.3, rel=0.02)


def test_a_machine_that_was_away_is_no_step():
    steps = served([DECODE] * 30, {8: 1.0})
    away = [dataclasses.replace(steps[-1], scheduled_s=steps[-1].ended_s - 1e-4, ended_s=steps[-1].ended_s + 5)]
    corrected = in_service(TABLE, [steps + away])
    assert corrected.step_s(DECODE) == pytest.approx(0.008)
    assert max(corrected.excess_s(DECODE)) == pytest.approx(0)


def test_no_steps_change_nothing():
    assert in_service(TABLE, [[]]) is TABLE
