"""Lengths and arrivals of requests."""

import itertools
import statistics

import pytest

from sarathi_jax.workloads import CHAT, Length, TraceError, poisson, read_trace, scaled, synthesise


def test_a_trace_is_read(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.3,0,7\n9.1,12,3\n")
    assert read_trace(path) == [Length(374, 44), Length(12, 3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "num_prefill_tokens"),
        ("num_prefill_tokens,n\n1,2\n", "no column num_decode_tokens"),
        ("num_prefill_tokens,num_decode_tokens\n", "no request"),
        ("num_prefill_tokens,num_decode_tokens\n3,4\n5,x\n", ":3: num_decode_tokens is 'x'"),
        ("num_prefill_tokens,num_decode_tokens\n-3,4\n", ":2: num_prefill_tokens is '-3'"),
        ("num_prefill_tokens,num_decode_tokens\n3\n", ":2: num_decode_tokens is None"),
    ],
)
def test_what_is_no_trace_says_why(tmp_path, text, words):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=words):
        read_trace(path)
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(tmp_path / "missing.csv")


def test_synthesised_lengths_have_the_published_quantiles():
    lengths = synthesise(CHAT, 20_000, seed=1)
    assert lengths == synthesise(CHAT, 20_000, seed=1)
    assert max(length.prompt + length.output for length in lengths) <= CHAT.longest
    for values, (median, p90) in (
        ([length.prompt for length in lengths], CHAT.prompt),
        ([length.output for length in lengths], CHAT.output),
    ):
        assert statistics.median(values) == pytest.approx(median, rel=0.12)
        assert statistics.quantiles(values, n=10)[-1] == pytest.approx(p90, rel=0.2)


def test_they_are_near_those_of_the_recorded_trace(shared):
    recorded = read_trace(shared / "data/traces/openchat_sharegpt4.csv")
    drawn = synthesise(CHAT, len(recorded), seed=2)
    for name in ("prompt", "output"):
        theirs, ours = ([getattr(length, name) for length in lengths] for lengths in (recorded, drawn))
        assert statistics.mean(ours) == pytest.approx(statistics.mean(theirs), rel=0.2)


def test_scaled_lengths_fit():
    lengths = [Length(1, 1), Length(8000, 192), Length(4096, 4096)]
    assert scaled(lengths, 8192, 2048) == [Length(1, 1), Length(2000, 48), Length(1024, 1024)]
    assert scaled([Length(8191, 1)], 8192, 16) == [Length(15, 1)]


def test_poisson_arrivals():
    times = poisson(4.0, 10_000, seed=3)
    assert times == sorted(times) == poisson(4.0, 10_000, seed=3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert max(gaps) > 3 * 0.25
