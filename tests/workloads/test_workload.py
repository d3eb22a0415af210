"""Arrivals, and what they and lengths make together."""

import dataclasses
import functools
import itertools
import statistics

import pytest

from sarathi_jax.workloads import (
    CHAT,
    Length,
    TimedRequest,
    Trace,
    Workload,
    WorkloadError,
    bursts,
    fixed,
    gamma,
    in_order,
    poisson,
    recorded,
    static,
    synthesise,
)


def gaps_of(times: list[float]) -> list[float]:
    assert times == sorted(times)
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def test_poisson_arrivals():
    times = poisson(4.0, 10_000, seed=3)
    assert times == poisson(4.0, 10_000, seed=3)
    gaps = gaps_of(times)
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert max(gaps) > 3 * 0.25
    assert poisson(8.0, 100, seed=3) == pytest.approx([at_s / 2 for at_s in times[:100]])


@pytest.mark.parametrize("variation", [0.3, 1.0, 2.5])
def test_gamma_arrivals(variation):
    gaps = gaps_of(gamma(4.0, variation, 40_000, seed=7))
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.04)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, rel=0.05)


def test_bursts():
    times = bursts(2.0, 3.0, 7.0, 10_000, seed=8)
    gaps_of(times)
    assert max(at_s % 10 for at_s in times) <= 3.0
    assert len(times) / times[-1] == pytest.approx(2.0, rel=0.05)
    assert bursts(2.0, 3.0, 0.0, 10, seed=8) == poisson(2.0, 10, seed=8)


def test_static_and_recorded_arrivals():
    assert static(3) == [0.0, 0.0, 0.0]
    assert recorded((0.0, 2.0, 5.0), 0.5, 2) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: poisson(0, 1, 0), "rate must be a number above 0, not 0"),
        (lambda: poisson(-1, 1, 0), "rate must be"),
        (lambda: gamma(1, 0, 1, 0), "variation must be"),
        (lambda: bursts(1, 0, 1, 1, 0), "on_s must be"),
        (lambda: bursts(1, 1, -1, 1, 0), "off_s must be 0 or more seconds, not -1"),
        (lambda: recorded((0.0,), 0, 1), "time_scale must be"),
        (lambda: recorded((0.0,), 1, 2), "2 requests are asked for, but the times of 1 are recorded"),
        (lambda: recorded(None, 1, 1), "column arrived_at"),
    ],
)
def test_impossible_arrivals_say_so(draw, words):
    with pytest.raises(WorkloadError, match=words):
        draw()


def test_a_workload_is_the_same_for_the_same_seed():
    chat, two = functools.partial(synthesise, CHAT), functools.partial(poisson, 2.0)
    workload = Workload(chat, two, 200, seed=1)
    requests = workload.requests()
    assert requests == Workload(chat, two, 200, seed=1).requests() != Workload(chat, two, 200, seed=2).requests()
    slower = Workload(chat, functools.partial(poisson, 1.0), 200, seed=1).requests()
    assert [(r.prompt, r.output) for r in slower] == [(r.prompt, r.output) for r in requests]
    assert [r.arrival_s for r in slower] == pytest.approx([2 * r.arrival_s for r in requests])
    # One seed for both is not one stream of random numbers.
    gaps = gaps_of([0.0, *(r.arrival_s for r in requests)])
    assert abs(statistics.correlation(gaps, [r.prompt for r in requests], method="ranked")) < 0.2


def test_a_recorded_workload_keeps_lengths_with_their_times():
    trace = Trace((Length(5, 1), Length(6, 2), Length(7, 3)), (0.0, 1.5, 2.0))
    replay = Workload(
        functools.partial(in_order, trace.lengths), functools.partial(recorded, trace.arrivals_s, 2.0), number=2
    )
    assert replay.requests() == [TimedRequest(0.0, 5, 1), TimedRequest(3.0, 6, 2)]


def test_a_workload_is_scaled_to_a_context():
    workload = Workload(functools.partial(fixed, 4000, 192), static, 2, context=1024, longest=8192)
    assert workload.requests() == [TimedRequest(0.0, 500, 24)] * 2
    with pytest.raises(WorkloadError, match="context and longest go together"):
        Workload(functools.partial(fixed, 1, 1), static, 2, context=1024)
    with pytest.raises(WorkloadError, match="at least 1 request, not 0"):
        Workload(functools.partial(fixed, 1, 1), static, 0)


def test_groups_share_the_beginning_of_their_prompts():
    plain = Workload(functools.partial(synthesise, CHAT), functools.partial(poisson, 2.0), 200, seed=1)
    grouped = dataclasses.replace(plain, groups=4, shared_tokens=1000)
    requests = grouped.requests()
    assert requests == grouped.requests()
    assert [dataclasses.replace(one, group=None, shared=0) for one in requests] == plain.requests()
    assert {one.group for one in requests} == {0, 1, 2, 3}
    assert all(one.shared == min(1000, one.prompt) for one in requests)
    assert requests != dataclasses.replace(grouped, seed=2).requests()


@pytest.mark.parametrize("groups", [{"groups": 4}, {"shared_tokens": 9}, {"groups": 0, "shared_tokens": 9}])
def test_groups_that_cannot_be(groups):
    with pytest.raises(WorkloadError, match="groups"):
        Workload(functools.partial(fixed, 5, 5), static, 3, **groups)
