"""Workloads in words: what each word draws, and what is said of words that make no sense."""

import pytest
from absl import flags

from sarathi_jax.cli.fields import UsageError, parse
from sarathi_jax.cli.workload_flags import define_workload_flags, workload_spec
from sarathi_jax.workloads import (
    Workload,
    WorkloadError,
    WorkloadSpec,
    arrivals_of,
    fixed,
    gamma,
    lengths_of,
    poisson,
    uniform,
)


def given(*arguments: str, skip: tuple[str, ...] = ()) -> flags.FlagValues:
    values = flags.FlagValues()
    define_workload_flags(values, skip)
    parse(values, "bench", list(arguments))
    return values


def workload_of(values: flags.FlagValues, context: int | None = None) -> Workload:
    spec = workload_spec(values)
    return spec.open(context).at(spec.rate, spec.seed)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens,arrived_at\n30,10,5\n60,20,6\n90,10,9\n")
    return path


def test_lengths_in_words():
    assert lengths_of("fixed:512:64").draw(2, 0) == fixed(512, 64, 2)
    assert lengths_of("uniform:10-20:3").draw(5, 1) == uniform((10, 20), (3, 3), 5, 1)
    assert [lengths_of(spec).longest for spec in ("fixed:512:64", "uniform:10-20:3-4", "zipf:8-64:3:0.5")] == [
        576,
        24,
        64,
    ]
    assert all(8 <= length.prompt + length.output <= 64 for length in lengths_of("zipf:8-64:3").draw(50, 2))


def test_arrivals_in_words():
    assert arrivals_of("poisson")(2.0)(5, 1) == poisson(2.0, 5, 1)
    assert arrivals_of("gamma:2")(2.0)(5, 1) == gamma(2.0, 2.0, 5, 1)
    assert arrivals_of("static")(None)(3, 1) == [0, 0, 0]
    assert len(arrivals_of("bursts:5:0")(2.0)(5, 1)) == 5


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rate=0",),
        ("--rate=-1",),
        ("--rate=nan",),
        ("--rate=inf",),
        ("--rate=two",),
        ("--arrivals=sometimes", "--rate=1"),
        ("--arrivals=gamma:0", "--rate=1"),
        ("--arrivals=bursts:5", "--rate=1"),
        ("--arrivals=static", "--rate=1"),
        ("--lengths=fixed:512", "--rate=1"),
        ("--lengths=fixed:0:1", "--rate=1"),
        ("--lengths=uniform:20-10:3", "--rate=1"),
        ("--lengths=zipf:8-64:-1", "--rate=1"),
        ("--lengths=fixed:1:1", "--trace=chat", "--rate=1"),
        ("--num_requests=0", "--rate=1"),
        ("--context=1", "--rate=1"),
        (),
    ],
)
def test_a_workload_that_makes_no_sense_is_a_wrong_command_line(arguments):
    with pytest.raises(UsageError):
        workload_of(given(*arguments))


def test_a_file_that_is_missing_or_no_trace_is_told(tmp_path):
    with pytest.raises(WorkloadError, match="no file"):
        workload_of(given("--trace=nowhere.csv", "--rate=1"))
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(WorkloadError, match="num_prefill_tokens"):
        workload_of(given(f"--trace={tmp_path / 'bad.csv'}", "--rate=1"))


def test_lengths_are_scaled_to_a_model_that_is_too_small_and_to_a_context_that_is_asked_for(trace):
    rated = (f"--trace={trace}", "--rate=1", "--num_requests=3")
    assert max(r.prompt + r.output for r in workload_of(given(*rated), 1000).requests()) == 100
    assert max(r.prompt + r.output for r in workload_of(given(*rated), 50).requests()) == 50
    assert max(r.prompt + r.output for r in workload_of(given(*rated, "--context=10"), 50).requests()) == 10
    with pytest.raises(WorkloadError, match="lower it"):
        workload_of(given(*rated, "--context=60"), 50)
    assert "scaled from 100 to 50" in workload_spec(given(*rated)).open(50).source


def test_recorded_arrivals_bring_their_lengths(trace):
    requests = workload_of(given(f"--trace={trace}", "--arrivals=recorded:0.5")).requests()
    assert [(r.arrival_s, r.prompt) for r in requests] == [(0, 30), (0.5, 60), (2, 90)]
    with pytest.raises(WorkloadError, match="no arrivals to replay"):
        workload_of(given("--lengths=fixed:1:1", "--arrivals=recorded"))


def test_a_rate_can_be_looked_for():
    workloads = workload_spec(given("--trace=chat", "--num_requests=4", skip=("rate",)), skip=("rate",)).open()
    slow, quick = workloads.at(1.0, 3).requests(), workloads.at(2.0, 3).requests()
    assert [r.prompt for r in slow] == [r.prompt for r in quick]
    assert [r.arrival_s for r in slow] == pytest.approx([2 * r.arrival_s for r in quick])
    assert WorkloadSpec(arrivals="static").has_rate is False


def test_groups_in_flags():
    workload = workload_of(given("--lengths=fixed:30:5", "--rate=1", "--groups=2", "--shared_tokens=20"))
    assert {(one.group, one.shared) for one in workload.requests()} == {(0, 20), (1, 20)}
    with pytest.raises(UsageError, match="go together"):
        workload_of(given("--rate=1", "--groups=2"))
