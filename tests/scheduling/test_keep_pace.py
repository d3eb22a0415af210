"""The chooser that keeps a promised time between tokens."""

import dataclasses

import pytest

from sarathi_jax.latency import LatencyTable, StepTimes, Timing, Work, chunk_keys
from sarathi_jax.scheduling.plan import Chunk, Demand, FillToEdge, KeepPace, StepPlan

BUCKETS = (8, 64, 256)
PROMPT = ((0, 10_000),)


def chooser(num_stages: int = 1) -> KeepPace:
    """0.1 ms a token of the bucket, 1 us a decode's key, 0.1 us a key of a chunk's token; no margin."""
    timings = []
    for b in BUCKETS:
        timings += [Timing(b, b, keys, 0, b * 1e-4 + keys * 1e-6) for keys in (0, 10_000)]
        timings += [Timing(b, 0, 0, keys, b * 1e-4 + keys * 1e-7) for keys in (0, 1_000_000)]
    times = StepTimes(LatencyTable(timings))
    for _ in range(400):
        times.observe(work := Work(8, 8, 10), times.table.step_s(work))
    return KeepPace(times, BUCKETS, num_stages)


@pytest.mark.parametrize(
    ("demand", "limit"),
    [
        (Demand(4, PROMPT), 256),  # nobody was promised anything
        (Demand(0, PROMPT, pace_s=0.001), 256),  # nobody generates
        (Demand(4, PROMPT, 100, pace_s=0.050), 256),
        (Demand(4, PROMPT, 100, pace_s=0.020), 64),
        (Demand(4, PROMPT, 100, pace_s=0.002), 8),
        (Demand(4, PROMPT, 100, pace_s=0.0001), 4),  # not even the decodes alone: no prompt enters
        (Demand(4, PROMPT, 12_000, pace_s=0.020), 64),  # the decodes' own keys leave less
        (Demand(4, PROMPT, 14_500, pace_s=0.020), 8),
        (Demand(4, ((50_000, 10_000),), 100, pace_s=0.022), 8),  # late chunks of a long prompt cost more
        (Demand(4, ((0, 4),), 100, pace_s=0.050), 8),  # never more than is wanted
        (Demand(8, (), 100, pace_s=0.050), 8),
    ],
)
def test_the_largest_bucket_in_time(demand, limit):
    assert chooser()(demand) == limit


@pytest.mark.parametrize(
    ("pace_s", "num_stages", "limit"),
    [
        (0.0300, 1, 256),  # 25.6 ms for 256 tokens, 3.3 for their keys, then 0.8 for the decodes and 0.1 for theirs
        (0.0295, 1, 64),
        (0.0076, 1, 64),
        (0.0074, 1, 8),
        (0.0016, 1, 0),  # no prompt enters
        (0.0300, 2, 256),  # a token comes round after as many steps
        (0.0300, 3, 64),
    ],
)
def test_decodes_after_a_step_of_prompts(pace_s, num_stages, limit):
    short = ((0, 300),)
    assert chooser(num_stages)(Demand(4, short, 100, pace_s=pace_s, alternates=True)) == limit


def test_decodes_in_the_next_step_leave_this_one_to_prompts():
    assert FillToEdge(BUCKETS)(Demand(8, ((0, 256),))) == 256
    assert FillToEdge(BUCKETS)(Demand(60, ((0, 64),), alternates=True)) == 64


def test_a_pipeline_goes_round_once_a_token():
    demand = Demand(4, PROMPT, 100, pace_s=0.050)
    assert chooser(num_stages=1)(demand) == 256
    assert chooser(num_stages=4)(demand) == 64


def test_steps_of_a_pipeline_grow_from_round_to_round():
    """Two stages: a token of a short step comes round after three long ones, less the short one."""
    step_s = chooser()._times.expected_s((plan := StepPlan((Chunk(0, 99, 1, True),), 256, 1)).work)
    demand = Demand(4, PROMPT, 100, pace_s=0.08, behind=(plan, plan))
    assert step_s == pytest.approx(0.0257)
    assert chooser(num_stages=2)(demand) == 256
    assert chooser(num_stages=2)(dataclasses.replace(demand, behind=(plan, None))) == 64
    assert chooser(num_stages=2)(dataclasses.replace(demand, pace_s=0.2, behind=(None, None))) == 256


def test_keys_are_counted_over_all_prompts_that_fit():
    first, second = (1000, 30), (200_000, 500)
    keys = chunk_keys(*first) + chunk_keys(200_000, 64 - 4 - 30)
    pace_s = 64e-4 + 100e-6 + keys * 1e-7
    assert chooser()(Demand(4, (first, second), 100, pace_s=pace_s * 1.01)) == 64
    assert chooser()(Demand(4, (first, second), 100, pace_s=pace_s * 0.98)) == 8
