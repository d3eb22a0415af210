"""Drift of the step times, and the forecast of a first token."""

import random

import pytest

from sarathi_jax.latency import Backlog, LatencyTable, StepTimes, Timing, Work, time_to_first_token_s


def table(*buckets: int) -> LatencyTable:
    """1 ms a token of the bucket, whatever the cache holds."""
    return LatencyTable([Timing(b, d, d, 1 - d, b / 1000) for b in buckets for d in (0, 1)])


def test_follows_a_device_that_slows_down():
    times = StepTimes(table(8))
    for _ in range(200):
        times.observe(Work(8, 8, 8), 0.016)
    assert times.drift == pytest.approx(2, rel=0.01)
    assert times.expected_s(Work(8, 8, 8)) == pytest.approx(0.016, rel=0.01)
    assert times.bound_s(Work(8, 8, 8)) == pytest.approx(0.016, rel=0.02), "a steady device needs no margin"


def test_a_restless_device_needs_a_margin():
    times, rng = StepTimes(table(8)), random.Random(0)
    measured = [0.008 * rng.uniform(0.8, 1.2) for _ in range(500)]
    for seconds in measured:
        times.observe(Work(8, 8, 8), seconds)
    bound_s = times.bound_s(Work(8, 8, 8))
    assert sum(seconds > bound_s for seconds in measured) < 0.05 * len(measured)
    assert bound_s < 0.008 * 1.4


def test_one_hiccup_counts_little():
    times = StepTimes(table(8))
    times.observe(Work(8, 8, 8), 30.0)
    assert times.bound_s(Work(8, 8, 8)) < 0.008 * 2


def test_large_steps_keep_their_time_where_small_ones_are_quicker():
    times = StepTimes(table(8, 64))
    for i in range(400):
        bucket = 64 if i % 10 == 0 else 8
        times.observe(Work(bucket, bucket, bucket), (0.064 if bucket == 64 else 0.004))
    assert times.drift < 0.7
    assert 0.064 <= times.bound_s(Work(64, 64, 64)) < 0.07


def test_a_size_that_was_slow_once_is_tried_again():
    times = StepTimes(table(8, 64))
    times.observe(Work(64, 64, 64), 0.064 * 4)
    assert times.bound_s(Work(64, 64, 64)) > 0.064 * 1.3
    for _ in range(5000):
        times.observe(Work(8, 8, 8), 0.008)
    assert times.bound_s(Work(64, 64, 64)) < 0.064 * 1.05


def test_a_slower_device_is_slower_at_every_size():
    times = StepTimes(table(8, 64))
    for _ in range(200):
        times.observe(Work(8, 8, 8), 0.016)
    assert times.bound_s(Work(64, 64, 64)) == pytest.approx(0.128, rel=0.02)


def test_first_token_of_an_idle_engine_is_its_own_prompt():
    times = StepTimes(table(8, 64))
    assert time_to_first_token_s(Backlog(), 128, times, 1) == pytest.approx(2 * 0.064)
    assert time_to_first_token_s(Backlog(), 128, times, 2) == pytest.approx(3 * 0.064), "and the way through the stages"


def test_first_token_waits_for_prompts_before_it():
    times, backlog = StepTimes(table(8, 64)), Backlog(num_prefill_tokens=560, num_decodes=4, num_decode_keys=100)
    assert time_to_first_token_s(backlog, 40, times, 1) == pytest.approx(10 * 0.064)


def test_a_promised_pace_makes_steps_smaller():
    times = StepTimes(table(8, 64))
    backlog = Backlog(num_decodes=4, num_decode_keys=100, pace_s=0.05)
    assert time_to_first_token_s(backlog, 40, times, 1) == pytest.approx(10 * 0.008)


def test_first_token_waits_for_a_free_row():
    times = StepTimes(table(8, 64))
    backlog = Backlog(num_decodes=8, num_decode_keys=9, num_free_rows=0, num_waiting=0, steps_to_free_row=100)
    assert time_to_first_token_s(backlog, 10, times, 1) == pytest.approx(0.064 + 100 * 0.008)
