"""Lengths of requests: drawn, synthesised, scaled."""

import collections
import statistics

import pytest

from sarathi_jax.workloads import (
    ARXIV,
    CHAT,
    Length,
    LengthQuantiles,
    WorkloadError,
    fixed,
    in_order,
    read_trace,
    scaled,
    shuffled,
    synthesise,
    uniform,
    zipf,
)
from sarathi_jax.workloads.traces import SPLITWISE


@pytest.mark.parametrize("quantiles", [CHAT, ARXIV, SPLITWISE])
def test_synthesised_lengths_have_the_published_quantiles(quantiles):
    lengths = synthesise(quantiles, 40_000, seed=1)
    assert lengths[:50] == synthesise(quantiles, 50, seed=1)
    assert max(length.prompt + length.output for length in lengths) <= quantiles.longest
    for values, (median, p90) in (
        ([length.prompt for length in lengths], quantiles.prompt),
        ([length.output for length in lengths], quantiles.output),
    ):
        assert statistics.median(values) == pytest.approx(median, rel=0.02)
        assert statistics.quantiles(values, n=10)[-1] == pytest.approx(p90, rel=0.02)


@pytest.mark.parametrize(
    ("prompt", "longest", "words"),
    [
        ((100, 100), 1000, "a median of 100 and a P90 of 100 tokens are impossible"),
        ((100, 2000), 1000, "at most 1000"),
        ((0, 10), 1000, "from 1"),
        ((2730, 3702), 4096, "no log-normal lengths of at most 4096"),
    ],
)
def test_impossible_quantiles_say_so(prompt, longest, words):
    with pytest.raises(WorkloadError, match=words):
        synthesise(LengthQuantiles(prompt, (167, 372), longest), 1, seed=0)


def test_they_are_near_those_of_the_recorded_trace(shared):
    recorded = read_trace(shared / "data/traces/openchat_sharegpt4.csv")
    drawn = synthesise(CHAT, len(recorded), seed=2)
    for name in ("prompt", "output"):
        theirs, ours = ([getattr(length, name) for length in lengths] for lengths in (recorded, drawn))
        assert statistics.mean(ours) == pytest.approx(statistics.mean(theirs), rel=0.11)


def test_scaled_lengths_fit():
    lengths = [Length(1, 1), Length(8000, 192), Length(4096, 4096)]
    assert scaled(lengths, 8192, 2048) == [Length(1, 1), Length(2000, 48), Length(1024, 1024)]
    assert scaled([Length(8191, 1)], 8192, 16) == [Length(15, 1)]


def test_fixed_and_uniform_lengths():
    assert fixed(3, 4, 2) == [Length(3, 4)] * 2
    lengths = uniform((10, 20), (1, 3), 2000, seed=4)
    assert lengths == uniform((10, 20), (1, 3), 2000, seed=4) != uniform((10, 20), (1, 3), 2000, seed=5)
    assert {length.prompt for length in lengths} == set(range(10, 21))
    assert {length.output for length in lengths} == {1, 2, 3}


def test_zipf_lengths():
    lengths = zipf((2, 64), 3.0, 50_000, seed=5, exponent=1.5)
    totals = collections.Counter(length.prompt + length.output for length in lengths)
    assert set(totals) == set(range(2, 65))
    assert totals[4] / totals[16] == pytest.approx(4**1.5, rel=0.1)
    assert {length for length in lengths if length.prompt + length.output in (2, 40)} == {Length(1, 1), Length(30, 10)}


def test_recorded_lengths_are_shuffled_or_in_order():
    lengths = [Length(n, 1) for n in range(1, 11)]
    drawn = shuffled(lengths, 25, seed=6)
    assert set(drawn[:10]) == set(drawn[10:20]) == set(lengths)
    assert len(drawn) == 25
    assert in_order(lengths, 3) == lengths[:3]
    with pytest.raises(WorkloadError, match="11 requests are asked for, but 10 are recorded"):
        in_order(lengths, 11)
    with pytest.raises(WorkloadError, match="no recorded lengths"):
        shuffled([], 1, seed=0)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: fixed(0, 1, 1), "prompt must be at least 1 token, not 0"),
        (lambda: uniform((5, 4), (1, 1), 1, 0), "prompt: the greatest length, 4, is below the least, 5"),
        (lambda: uniform((5, 6), (-1, 1), 1, 0), "output must be at least 1"),
        (lambda: zipf((1, 4), 1, 1, 0), "total must be at least 2 tokens"),
        (lambda: zipf((2, 4), 0, 1, 0), "prompts_per_output must be a number above 0"),
        (lambda: zipf((2, 4), 1, 1, 0, exponent=float("nan")), "exponent must be"),
        (lambda: scaled([], 0, 10), "longest must be at least 2"),
        (lambda: scaled([], 10, 1), "context must be at least 2"),
    ],
)
def test_impossible_lengths_say_so(draw, words):
    with pytest.raises(WorkloadError, match=words):
        draw()
