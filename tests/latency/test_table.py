"""The latency table against what it was made from, and against numbers worked out by hand."""

import dataclasses
import json

import pytest

from sarathi_jax.latency import LatencyTable, Spread, TableError, Timing, Work, chunk_keys


def timings(bucket: int = 8) -> list[Timing]:
    decodes = [Timing(bucket, 4, keys, 0, 0.010 + keys * 1e-4) for keys in (4, 100, 200, 400)]
    return decodes + [Timing(bucket, 0, 0, keys, 0.008 + keys * 1e-5) for keys in (36, 1000, 2000, 4000)]


def test_chunk_keys_counts_pairs():
    assert chunk_keys(5, 3) == sum(len(range(5 + i + 1)) for i in range(3))
    assert chunk_keys(7, 0) == 0


def test_measured_points_come_back():
    table = LatencyTable(timings())
    for timing in table.timings:
        work = Work(8, timing.num_decodes, timing.num_decode_keys, timing.num_prefill_keys)
        assert table.step_s(work) == pytest.approx(timing.seconds)


@pytest.mark.parametrize(
    ("decode_keys", "prefill_keys", "seconds"),
    [
        (150, 0, 0.025),  # between two points
        (800, 0, 0.090),  # beyond the last one, along its slope
        (1, 0, 0.0104),  # before the first
        (0, 3000, 0.038),
        (0, 9, 0.00836),  # a chunk that leaves most of the bucket empty
        (100, 1000, 0.020 + 0.018 - 0.00836),  # both: what either adds to the emptier of the two
    ],
)
def test_between_and_beyond(decode_keys, prefill_keys, seconds):
    work = Work(8, 4 * bool(decode_keys), decode_keys, prefill_keys)
    assert LatencyTable(timings()).step_s(work) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "work",
    [Work(8, 2, 100), Work(8, num_prefill_keys=18), Work(8, 0, 0, 3000), Work(8, 2, 100, 18), Work(8, 4, 9, 999)],
)
def test_parts_say_which_timings_a_step_rests_on(work):
    table = with_one_decode()
    parts = table.parts(work)
    assert table.step_s(work) == pytest.approx(sum(parts.values()))
    for number in (0, 1, 4):
        twice = [
            dataclasses.replace(timing, seconds=1.01 * timing.seconds) if timing.num_decodes == number else timing
            for timing in table.timings
        ]
        more_s = LatencyTable(twice).step_s(work) - table.step_s(work)
        assert more_s == pytest.approx(0.01 * parts.get(number, 0.0))


def with_one_decode() -> LatencyTable:
    """Of four decodes as in `timings`, of one a tenth; the emptiest step takes 2 ms."""
    one = [Timing(8, 1, keys, 0, 0.002 + keys * 1e-5) for keys in (0, 100)]
    return LatencyTable([*timings(), *one])


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(8, 1, 50), 0.0025),
        (Work(8, 4, 200), 0.030),
        (Work(8, 2, 100), 0.0025 + (0.030 - 0.0025) / 3),  # a third of the way from one to four, each of 50 keys
        (Work(8, 6, 200), 0.030),  # more than were measured
        (Work(8, num_prefill_keys=18), 0.002 + (0.00836 - 0.002) / 2),  # half of the smallest chunk measured
        (Work(8, 1, 50, 1000), 0.0025 + 0.018 - 0.002),
    ],
)
def test_fewer_decodes_of_equal_length_are_quicker(work, seconds):
    assert with_one_decode().step_s(work) == pytest.approx(seconds)


def test_noise_never_makes_a_fuller_cache_quicker():
    noisy = [Timing(1, 1, keys, 0, s) for keys, s in ((1, 0.02), (10, 0.01), (20, 0.03))]
    table = LatencyTable([*noisy, Timing(1, 0, 0, 1, 0.02)])
    times = [table.step_s(Work(1, 1, keys)) for keys in range(1, 60)]
    assert times == sorted(times)


def test_kept_in_a_file(tmp_path):
    spread = Spread(8, True, (-0.001, 0.001))
    table = LatencyTable(timings(), {"device": "x"}, 0.001, [spread])
    table.save(tmp_path / "deep" / "table.json")
    again = LatencyTable.load(tmp_path / "deep" / "table.json")
    assert (again.timings, again.about, again.buckets) == (table.timings, {"device": "x"}, (8,))
    assert (again.idle_s, again.spreads) == (0.001, (spread,))
    assert again.excess_s(Work(8, num_prefill_keys=9)) == (-0.001, 0.001)
    assert again.excess_s(Work(8, 1, 9)) == (0.0,)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no latency table"),
        ("[]", "is no latency table"),
        (json.dumps({"format": 99, "timings": []}), "format 99, this version reads 4"),
        (json.dumps({"format": 4, "about": {}, "timings": [{"bucket": 1}]}), "is no latency table"),
        (json.dumps({"format": 4, "about": {}, "idle_s": 0, "timings": [], "spreads": []}), "needs timings"),
    ],
)
def test_a_damaged_file_says_so(tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(TableError, match=message):
        LatencyTable.load(path)


def test_a_bucket_needs_both_kinds():
    with pytest.raises(TableError, match="no timing of a prompt in bucket 8"):
        LatencyTable(timings()[:4])


def test_of_equal_work_the_longest_time_counts():
    same = [Timing(8, 0, 0, 36, seconds) for seconds in (0.02, 0.04, 0.03)]
    table = LatencyTable([Timing(8, 1, 1, 0, 0.01), *same])
    assert table.step_s(Work(8, num_prefill_keys=36)) == 0.04
