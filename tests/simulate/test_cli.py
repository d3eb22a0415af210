"""The verbs simulate, capacity and plan: what they print and write, and clear answers to bad input."""

import csv
import json
import re

import pytest

from sarathi_jax.cli import main
from sarathi_jax.latency.table import FORMAT

FEW = ("--lengths=fixed:200:20", "--num_requests=12")
APART = ("--prefill_replicas=1", "--decode_replicas=1")
MISTRAL = ("--model=mistral-7b", "--max_model_len=4096", "--max_num_seqs=8")


def run(*arguments):
    return main(["sarathi-jax", *arguments])


@pytest.mark.slow
def test_simulate_tells_and_writes_a_run(tmp_path, capsys):
    assert run("simulate", *MISTRAL, *FEW, "--rate=5", "--slo_ms=50", f"--out={tmp_path}") == 0
    told = capsys.readouterr()
    assert "12 arrived, 12 ended" in told.out
    assert "50 ms between tokens" in told.out
    assert "1 x a100-80gb: dp=1 tp=1 pp=1" in told.err
    assert len(list(csv.DictReader((tmp_path / "samples.csv").open()))) == 12
    assert run("simulate", *MISTRAL, *FEW, "--rate=5", "--slo_ms=50") == 0
    assert capsys.readouterr().out == told.out.partition("\nwritten to")[0]


@pytest.mark.slow
def test_prefill_and_decode_apart(tmp_path, capsys):
    pools = ("--prefill_replicas=1", "--decode_replicas=2", "--decode_device=h100", "--kv_link_latency_ms=500")
    assert run("simulate", *MISTRAL, *FEW, "--rate=5", *pools, f"--out={tmp_path}") == 0
    told = capsys.readouterr()
    assert "12 arrived, 12 ended" in told.out
    assert "prefill: 1 x a100-80gb: dp=1" in told.err
    assert "decode: 2 x h100: dp=2" in told.err
    rows = list(csv.DictReader((tmp_path / "samples.csv").open()))
    assert len(rows) == 12
    assert run("simulate", *MISTRAL, *FEW, "--rate=5", *pools[:2], "--decode_tp=2", "--kv_link_gb_s=900") == 0
    assert "decode: 4 x a100-80gb: dp=2 tp=2" in capsys.readouterr().err


@pytest.mark.slow
def test_groups_find_their_prefix_by_routing(tmp_path, capsys):
    arguments = ("--lengths=fixed:800:5", "--num_requests=30", "--rate=20", "--dp=3")
    computed = {}
    for routing in ("round_robin", "prefix_affinity"):
        groups = ("--groups=5", "--shared_tokens=640", f"--routing={routing}", f"--out={tmp_path / routing}")
        assert run("simulate", *MISTRAL, *arguments, *groups) == 0
        tables = (tmp_path / routing).glob("steps-*.csv")
        computed[routing] = sum(int(row["prefill_tokens"]) for path in tables for row in csv.DictReader(path.open()))
    assert computed["prefix_affinity"] < computed["round_robin"] < 30 * 800


@pytest.mark.slow
def test_capacity_tells_and_writes_a_search(tmp_path, capsys):
    arguments = ("--slo_ms=15", "--num_seeds=1", "--tolerance=0.2", "--guess=20", f"--out={tmp_path}")
    assert run("capacity", *MISTRAL, *FEW, *arguments) == 0
    told = capsys.readouterr()
    assert "requests/s; from" in told.out
    assert "P99 TBT" in told.err
    document = json.loads((tmp_path / "capacity.json").read_text())
    assert document["rate"] < document["below"] <= 1.2 * document["rate"]
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert sorted(float(row["rate"]) for row in rows) == [level["rate"] for level in document["levels"]]
    assert (tmp_path / "capacity.svg").is_file()


def test_capacity_where_nothing_meets_the_slo(capsys):
    assert run("capacity", *MISTRAL, *FEW, "--slo_ms=2", "--num_seeds=1") == 0
    assert "no rate meets it (P99 TBT of 2 ms" in capsys.readouterr().out


@pytest.mark.slow
def test_plan_tells_and_writes_choices(tmp_path, capsys):
    options = ("--devices=a100-80gb,a40", "--tps=1", "--pps=1", "--budgets=256", "--price=a40=100", "--num_seeds=1")
    asked = ("--rate=10", "--slo_ms=100", "--tolerance=0.2")
    assert run("plan", *MISTRAL, *FEW, *asked, *options, f"--out={tmp_path}") == 0
    told = capsys.readouterr().out
    assert "x [a100-80gb tp=1 pp=1 budget 256], $1.80/h" in told
    assert "a40 tp=1 pp=1 budget 256: costs at least $100.00/h" in told
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["best"] == "a100-80gb tp=1 pp=1 budget 256"
    assert document["prices"] == {"a100-80gb": 1.8, "a40": 100.0}
    assert len(list(csv.DictReader((tmp_path / "choices.csv").open()))) == 2
    assert (tmp_path / "pareto.svg").is_file()


def test_a_plan_that_nothing_serves_fails_with_reasons(capsys):
    assert run("plan", *MISTRAL, *FEW, "--rate=1", "--slo_ms=1", "--tps=1,3", "--pps=1", "--budgets=256") == 1
    told = capsys.readouterr().out
    assert "a single request alone has a TBT of" in told
    assert "tp=3: 32 query heads cannot be split evenly" in told
    assert "nothing serves 1 requests/s with a P99 TBT of 1 ms" in told


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("simulate", "--model=mistral-7b"), "--rate is missing"),
        (("simulate", "--rate=0"), "rate must be a number above 0"),
        (("simulate", "--model=mistrl-7b", "--rate=1"), "do you mean mistral-7b"),
        (("simulate", "--model=mistral-7b", "--device=a100", "--rate=1"), "do you mean a100-80gb"),
        (("simulate", "--model=falcon-180b", "--rate=1"), "the model does not fit: .* what fits: tp="),
        (("simulate", "--model=mistral-7b", "--pp=40", "--rate=1"), "32 layers make at most 32 stages"),
        (("simulate", "--model=mistral-7b", "--tp=3", "--rate=1"), "tp may be 1, 2, 4"),
        (("simulate", "--model=llama2-70b", "--tp=16", "--rate=1"), "no link joins 16 a100-80gb"),
        (("simulate", "--model=mistral-7b", "--pp=2", "--table=/none.json", "--rate=1"), "none.json"),
        (("simulate", "--model=mistral-7b", "--rate=1", "--time_limit_s=0"), "--time_limit_s=0 must be above 0"),
        (("simulate", "--rate=1", "--groups=3"), "groups and shared_tokens go together"),
        (("simulate", "--rate=1", "--prefill_replicas=1"), "go together: how many of each"),
        (("simulate", "--rate=1", "--decode_tp=2"), "--decode_tp needs --prefill_replicas"),
        (("simulate", "--rate=1", *APART, "--dp=2"), "--dp does not go with"),
        (("simulate", "--rate=1", *APART, "--time_limit_s=2"), "--time_limit_s does not go with"),
        (("simulate", "--rate=1", *APART, "--kv_link_gb_s=0"), "--kv_link_gb_s=0 must be above 0"),
        (("simulate", "--rate=1", *APART, "--decode_device=h10"), "--decode_device: .*do you mean h100"),
        (("simulate", "--model=mistral-7b", "--rate=1", *APART, "--decode_tp=3"), "the decode replicas: .*tp"),
        (("capacity", "--model=mistral-7b"), "--slo_ms says"),
        (("capacity", "--model=mistral-7b", "--slo_ms=0"), "above 0"),
        (("capacity", "--model=mistral-7b", "--slo_ms=9", "--arrivals=static"), "no rate to look for"),
        (("capacity", "--slo_ms=9", "--guess=0"), "--guess=0 must be above 0"),
        (("capacity", "--slo_ms=9", "--num_seeds=0"), "--num_seeds=0 must be at least 1"),
        (("capacity", "--slo_ms=9", "--engine=real", "--device=a40"), "--device is of simulations"),
        (("plan", "--model=mistral-7b", "--slo_ms=9"), "--rate says how many requests a second"),
        (("plan", "--model=mistral-7b", "--rate=0", "--slo_ms=9"), "--rate says .* above 0"),
        (("plan", "--rate=1", "--slo_ms=9", "--devices=h10"), "do you mean h100"),
        (("plan", "--rate=1", "--slo_ms=9", "--price=h100:3"), "write DEVICE=DOLLARS"),
        (("plan", "--rate=1", "--slo_ms=9", "--price=h100=0"), "what does h100 cost"),
        (("plan", "--rate=1", "--slo_ms=9", "--budgets=many"), "'many' is not a number above 0 or slo"),
        (("plan", "--model=mistral-7b", "--rate=1", "--slo_ms=9", "--policy=vllm"), "budgets of sarathi"),
    ],
)
def test_bad_input_gets_a_clear_answer(arguments, match, capsys):
    assert run(*arguments) in (1, 2)
    error = capsys.readouterr().err
    assert "unexpected" not in error
    assert re.search(match, error), error


def test_a_malformed_table_and_one_of_other_buckets(tmp_path, capsys):
    path = tmp_path / "table.json"
    path.write_text("[]")
    arguments = ("simulate", "--model=mistral-7b", "--rate=1", f"--table={path}")
    assert run(*arguments) == 1
    assert "is no latency table" in capsys.readouterr().err
    timing = {"bucket": 8, "num_decode_keys": 9, "num_prefill_keys": 0, "seconds": 0.01}
    timings = [timing | {"num_decodes": 8}, timing | {"num_decodes": 0}]
    path.write_text(json.dumps({"format": FORMAT, "about": {}, "idle_s": 0, "timings": timings, "spreads": []}))
    assert run(*arguments) == 1
    assert "has no times of bucket 1, 16" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["simulate", "capacity", "plan"])
def test_help_teaches_with_examples(verb, capsys):
    assert run(verb, "--help") == 0
    told = capsys.readouterr().out
    assert f"sarathi-jax {verb} --" in told
    assert "mistral-7b" in told
    assert run(verb, "stray") == 2
    assert "unexpected 'stray'" in capsys.readouterr().err
