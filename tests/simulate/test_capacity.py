"""The search for a capacity, against servers whose capacity is known."""

import math
import random

import pytest

from sarathi_jax.simulate.capacity import CapacityError, Trial, delay_resolution, find_capacity
from sarathi_jax.telemetry.definitions import SampleTimes
from sarathi_jax.telemetry.run import Run


def queue(rate: float, seed: int, *, service_s: float = 0.1, number: int = 400, tbt_s=lambda waiting: 0.01) -> Run:
    """One after another, in the order of arrival; a request's three tokens are as far apart as the queue is long."""
    generator, at_s, free_s, samples = random.Random(seed), 0.0, 0.0, []
    for i in range(number):
        at_s += generator.expovariate(1.0) / rate
        start_s = max(at_s, free_s)
        free_s = start_s + service_s
        gap_s = tbt_s((start_s - at_s) / service_s)
        token_s = tuple(free_s + k * gap_s for k in range(3))
        samples.append(SampleTimes(str(i), at_s, token_s, start_s, token_s[-1]))
    return Run(tuple(samples), max(sample.token_s[-1] for sample in samples))


def bound_by_tbt(rate: float, seed: int, limit: float = 3.0, noise: float = 0.0) -> Run:
    """P99 TBT is 0.1 s times the rate over `limit`, give or take noise of each seed and rate."""
    factor = 1 + noise * random.Random(f"{seed} {rate}").uniform(-1, 1)
    return queue(rate, seed, service_s=1e-4, number=50, tbt_s=lambda waiting: 0.1 * rate / limit * factor)


@pytest.mark.parametrize("guess", [0.01, 2.9, 500.0])
@pytest.mark.parametrize("tolerance", [0.05, 0.01])
def test_a_bound_by_tbt_is_found_from_anywhere(guess, tolerance):
    capacity = find_capacity(bound_by_tbt, tbt_slo_s=0.1, guess=guess, tolerance=tolerance)
    assert capacity.rate <= 3.0 < capacity.below <= capacity.rate * (1 + tolerance)
    assert capacity.bound == "tbt"
    assert capacity.at_capacity is not None
    assert capacity.at_capacity.p99_tbt_s <= 0.1
    assert len(capacity.at_capacity.trials) == 3
    assert capacity.spread == (capacity.rate, capacity.below)
    rates = [level.rate for level in capacity.levels]
    assert rates == sorted(rates)
    assert "requests/s; from" in str(capacity)


@pytest.mark.slow
def test_a_bound_by_delay_comes_out_as_much_too_high_as_the_run_is_short():
    """Ten a second are served: delays grow without end beyond it, but slowly just beyond it."""
    found = [find_capacity(lambda r, s, n=n: queue(r, s, number=n), tbt_slo_s=0.1, tolerance=0.01) for n in (200, 1600)]
    assert {one.bound for one in found} == {"delay"}
    for one, number in zip(found, (200, 1600), strict=True):
        assert 9.3 < one.rate < 10 * (1 + 1.5 * delay_resolution(10, number) + 0.05)
    assert abs(found[1].rate - 10) < abs(found[0].rate - 10)


def test_noise_moves_the_bracket_until_all_seeds_agree():
    def probe(rate, seed):
        return bound_by_tbt(rate, seed, limit=2.0 if seed == 0 else 3.0, noise=0.02)

    # P99 of the pooled times is that of the seed which is slowest: the first one.
    capacity = find_capacity(probe, tbt_slo_s=0.1, tolerance=0.02, seeds=(5, 0, 7))
    assert 1.9 < capacity.rate < 2.1
    assert capacity.spread[0] <= capacity.rate
    assert capacity.spread[1] > 2.8
    # Likewise when the first seed is the one that looks too low.
    mean = find_capacity(
        lambda r, s: queue(r, s, number=300, service_s=0.1 if s else 0.2), tbt_slo_s=0.1, seeds=(0, 1, 2)
    )
    assert mean.rate > 9


def test_the_same_search_gives_the_same_answer_and_tells_of_every_run():
    told: list[Trial] = []
    first = find_capacity(bound_by_tbt, tbt_slo_s=0.1, on_trial=told.append)
    assert first == find_capacity(bound_by_tbt, tbt_slo_s=0.1)
    assert sorted((t.rate, t.seed) for t in told) == [(t.rate, t.seed) for level in first.levels for t in level.trials]
    assert len(told) < 30


def test_zero_where_even_an_idle_server_is_too_slow():
    told: list[Trial] = []
    capacity = find_capacity(
        lambda r, s: queue(r, s, number=20, tbt_s=lambda waiting: 0.3), tbt_slo_s=0.1, on_trial=told.append
    )
    assert (capacity.rate, capacity.bound) == (0.0, "tbt")
    assert len(told) == 2  # no time between tokens kept it: the lowest rate tells
    assert "no rate meets it" in str(capacity)
    assert "P99 TBT is 300 ms" in str(capacity)
    assert "shortest TBT of all is 300 ms" in str(capacity)


def test_zero_where_a_share_of_times_is_too_long_at_any_rate():
    def probe(rate, seed):
        samples = [
            SampleTimes(str(i), i / rate, (i / rate, i / rate + (0.3 if i % 10 else 0.01)), i / rate, i / rate + 0.3)
            for i in range(50)
        ]
        return Run(tuple(samples), 50 / rate + 1)

    capacity = find_capacity(probe, tbt_slo_s=0.1)
    assert capacity.rate == 0
    assert capacity.levels[0].rate == pytest.approx(1 / 4096)


def test_unlimited_where_requests_that_come_at_once_are_served():
    capacity = find_capacity(lambda r, s: queue(r, s, number=10), tbt_slo_s=0.1)
    assert math.isinf(capacity.below)
    assert capacity.bound == ""
    assert "give more requests" in str(capacity)
    assert find_capacity(bound_by_tbt, tbt_slo_s=0.1, highest=2.0).rate == 2.0


def test_a_run_that_was_cut_off_with_most_requests_waiting_is_too_slow():
    def probe(rate, seed):
        whole = queue(rate, seed)
        if rate <= 10:
            return whole
        # Given up after a second: the few that were served were quick.
        samples = [
            s if (s.first_scheduled_s or 0) < 0.2 else SampleTimes(s.request_id, s.arrival_s) for s in whole.samples
        ]
        return Run(tuple(s for s in samples if s.arrival_s < 1), 1.0)

    capacity = find_capacity(probe, tbt_slo_s=0.1, guess=40)
    assert capacity.rate <= 10
    assert capacity.bound == "delay"


@pytest.mark.parametrize(
    "arguments",
    [
        {"tbt_slo_s": 0},
        {"step": 1.0},
        {"tolerance": 0},
        {"guess": -1.0},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"guess": 9, "highest": 3},
    ],
)
def test_searches_that_cannot_be(arguments):
    with pytest.raises(CapacityError):
        find_capacity(bound_by_tbt, **{"tbt_slo_s": 0.1, **arguments})


def test_a_run_of_nothing_is_refused():
    with pytest.raises(CapacityError, match="at least one request"):
        find_capacity(lambda r, s: Run((), 1.0), tbt_slo_s=0.1)
