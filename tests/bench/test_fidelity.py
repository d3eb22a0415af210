"""The comparison of the simulator with the engine: its page by hand, and the command in small."""

import json
import math
import subprocess
import sys

import pytest

from sarathi_jax.bench.fidelity_page import comparisons, draw, page

CASES = [("tiny", "sarathi")]


def parts(simulated: float, *real: float) -> dict:
    """One load at which everything takes so long, and capacities likewise."""

    def of_run(value: float) -> dict:
        return {"requests": 9, "p50_ttft_s": value, "p99_tbt_s": value}

    of_load = {f"tiny sarathi real 0.5 {name}": of_run(value) for name, value in zip("abc", real, strict=False)}
    capacities = {
        f"tiny sarathi capacity real {name}": {"requests_per_s": value}
        for name, value in zip("abc", real, strict=False)
    }
    return {
        "tiny slo": 1.0,
        "tiny throughput": 1.0,
        "tiny sarathi sim 0.5": of_run(simulated),
        "tiny sarathi capacity sim": {"requests_per_s": simulated},
        **of_load,
        **capacities,
    }


@pytest.mark.parametrize(
    ("simulated", "real", "error", "spread", "is_close"),
    [
        (1.0, (1.0, 1.0), 0.0, 0.0, True),
        (1.09, (1.0, 1.0), 0.09, 0.0, True),
        (1.12, (1.0, 1.0), 0.12, 0.0, False),
        (1.12, (0.9, 1.1), 0.12, 0.2, True),  # nearer than identical runs are to each other
        (0.7, (0.9, 1.1), -0.3, 0.2, False),
        (0.0, (0.0, 0.0), 0.0, 0.0, True),  # neither keeps the promise at any rate
        (1.0, (0.0, 0.0), math.inf, 0.0, False),
        (1.14, (0.85, 1.0, 1.15), 0.14, 0.2, True),  # pairs are 0.15, 0.15 and 0.3 apart
    ],
)
def test_close_is_a_tenth_or_the_spread(simulated, real, error, spread, is_close):
    found = comparisons(parts(simulated, *real), CASES)
    assert [one.what for one in found] == ["P50 TTFT", "P99 TBT", "capacity"]
    for one in found:
        assert (one.error, one.spread) == (pytest.approx(error), pytest.approx(spread))
        assert one.is_close == is_close


def test_page_and_picture(tmp_path):
    told = page(parts(1.2, 1.0, 1.0), CASES, "2 cores", 20.0)
    assert "On 2 cores: 0 of 3 numbers are close" in told
    assert "a P99 TBT of at most 1,000 ms (tiny)" in told
    assert "up to 20% too much" in told
    assert "| tiny | sarathi | 0.5 | 9 | P50 TTFT | 1,200 ms | 1,000, 1,000 ms | +20.0% | 0.0% | **no** |" in told
    draw(parts(1.2, 1.0, 1.0), CASES, tmp_path / "fidelity.svg")
    assert "tiny, sarathi" in (tmp_path / "fidelity.svg").read_text()


def test_a_search_without_a_capacity_has_no_place_in_the_picture(tmp_path):
    without = parts(1.2, 1.0, 1.0) | {"tiny sarathi capacity real b": {"requests_per_s": 0.0}}
    draw(without, CASES, tmp_path / "fidelity.svg")
    drawn = (tmp_path / "fidelity.svg").read_text()
    assert "P99 TBT" in drawn
    assert "capacity" not in drawn


def said_by(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_small_comparison_goes_on_where_it_was(tmp_path):
    flags = ["--models=shipped:64:4:2", "--policies=sarathi", "--loads=0.5", "--max_num_seqs=4"]
    flags += ["--seconds=0.2", "--search_requests=4", "--draws=2", "--tolerance=0.5", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "sarathi_jax.bench.fidelity", *flags, f"--page={tmp_path / 'page.md'}"]
    assert said_by(command).startswith("wrote ")
    first = (tmp_path / "page.json").read_text()
    kinds = {name.removeprefix("shipped ").removeprefix("sarathi ").split()[0] for name in json.loads(first)}
    assert kinds == {"throughput", "slo", "sim", "real", "capacity"}
    assert "simulated and real" in (tmp_path / "page.md").read_text()
    assert said_by(command).startswith("wrote ")
    assert (tmp_path / "page.json").read_text() == first
