"""Open loads on an engine without a model, on a tiny model in this process, and on a server that serves it."""

import json
import time
import types
from typing import Any

import pytest

from sarathi_jax.bench.replay import random_prompts, replay
from sarathi_jax.cli import main
from sarathi_jax.config import CacheConfig, EngineConfig
from sarathi_jax.engine import Engine
from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.replica import Replicas
from sarathi_jax.request import RequestError, SamplingParams
from sarathi_jax.scheduling.sarathi import SarathiScheduler
from sarathi_jax.telemetry.report import report, summary, write_run
from sarathi_jax.workloads import TimedRequest
from tests.engine.serving import Scripted
from tests.server.processes import serve, started
from tests.tiny_models import tiny_config, write_tiny_model

STEP_S = 0.01


class Slow(Scripted):
    """Takes its time for a step."""

    def collect(self, handle):
        time.sleep(STEP_S)
        return super().collect(handle)


def engine_of(model, num_blocks: int = 100) -> Engine:
    config = EngineConfig(max_model_len=64, max_num_seqs=4, token_buckets=(8, 32), block_size=8, overlap=False)
    cache = CacheConfig(block_size=8, num_blocks=num_blocks, max_model_len=64)
    scheduler = SarathiScheduler(
        BlockPool(num_blocks),
        block_size=8,
        buckets=(8, 32),
        max_num_seqs=4,
        max_model_len=64,
        window=None,
        num_stages=1,
    )
    sequences = {}
    return Engine(model, config, cache, scheduler, Slow([[7] * 64], sequences), sequences)


@pytest.fixture(scope="module")
def model():
    from sarathi_jax.weights.hf_config import model_config_from_hf

    return model_config_from_hf(tiny_config("llama2"))


def llm_of(model, engine=None) -> Any:
    return types.SimpleNamespace(engine=engine or engine_of(model), model_config=model)


def test_requests_come_at_their_times_though_a_step_is_under_way(model):
    requests = [TimedRequest(0.05 + 0.013 * i, 5 + i, 4) for i in range(5)]
    run = replay(llm_of(model), requests, progress=False)
    assert [sample.arrival_s for sample in run.samples] == [request.arrival_s for request in requests]
    assert [len(sample.token_s) for sample in run.samples] == [4] * 5
    assert [sample.num_prompt_tokens for sample in run.samples] == [5, 6, 7, 8, 9]
    assert all(0 <= delay < 0.1 for delay in run.scheduling_delays.values)
    assert all(gap >= STEP_S for gap in run.tbts.values)
    assert run.end_s == max(sample.finished_s for sample in run.samples)
    assert run.steps[0][0].scheduled_s >= 0.05
    assert sum(step.num_drawn for step in run.steps[0]) == 20


def test_a_request_may_say_when_it_came(model):
    engine = engine_of(model)
    before_s = time.monotonic()
    assert engine.add_request("a", [5], SamplingParams(max_tokens=1), arrival_s=1.5).arrival_s == 1.5
    assert before_s <= engine.add_request("b", [5], SamplingParams(max_tokens=1)).arrival_s <= time.monotonic()


def test_what_has_not_come_when_a_run_is_cut_off_counts_as_waiting(model):
    llm = llm_of(model)
    requests = [TimedRequest(0.0, 5, 50), TimedRequest(0.0, 5, 3), TimedRequest(0.11, 5, 50), TimedRequest(9.0, 5, 3)]
    run = replay(llm, requests, limit_s=0.15, progress=False)
    assert [sample.finished_s is not None for sample in run.samples] == [False, True, False]
    assert not any(sample.given_up_s for sample in run.samples)
    assert run.end_s == 0.15
    assert not llm.engine.has_work
    assert len(run.ttfts.values) + len(run.ttfts.longer_than) == 3
    numbers = summary(run)["requests"]
    assert (numbers["arrived"], numbers["ended"], numbers["unfinished"]) == (3, 1, 2)
    assert "cut off" in report(run, 0.05)
    num_steps = len(run.steps[0])
    replay(llm, requests[:2], progress=False)
    assert len(run.steps[0]) == num_steps, "the first run still listens"


def test_replicas_share_the_load_and_tell_their_steps_apart(model):
    llm = llm_of(model, Replicas([engine_of(model), engine_of(model)]))
    run = replay(llm, [TimedRequest(0.0, 5, 4)] * 4, progress=False)
    assert [sum(step.num_drawn for step in steps) for steps in run.steps] == [8, 8]


def test_a_preempted_request_tells_how_long_it_waited(model):
    llm = llm_of(model, engine_of(model, num_blocks=8))
    run = replay(llm, [TimedRequest(0.0, 20, 20)] * 3, progress=False)
    preempted = [sample for sample in run.samples if sample.num_preemptions]
    assert preempted
    assert all(sample.preempted_s > 0 for sample in preempted)
    assert "preempted" in report(run)


def test_a_request_that_can_never_be_served_is_told_before_the_run(model):
    llm = llm_of(model)
    begin_s = time.monotonic()
    with pytest.raises(RequestError, match="max_model_len"):
        replay(llm, [TimedRequest(0.0, 5, 3), TimedRequest(60.0, 64, 3)], progress=False)
    assert time.monotonic() - begin_s < 5
    assert not llm.engine.has_work


def test_random_prompts_are_the_same_for_a_seed():
    requests = [TimedRequest(0.0, 5, 3), TimedRequest(0.0, 7, 3)]
    one, two, other = (random_prompts(requests, 100, seed) for seed in (1, 1, 2))
    assert [prompt.tolist() for prompt in one] == [prompt.tolist() for prompt in two]
    assert [len(prompt) for prompt in other] == [5, 7]
    assert one[0].tolist() != other[0].tolist()
    assert min(prompt.min() for prompt in one) >= 10


def test_random_prompts_of_a_group_begin_alike():
    requests = [TimedRequest(0.0, 9 + i, 3, group=i % 2, shared=6 + i) for i in range(4)]
    prompts = [prompt.tolist() for prompt in random_prompts([*requests, TimedRequest(0.0, 9, 3)], 32_000, 0)]
    assert [len(prompt) for prompt in prompts] == [9, 10, 11, 12, 9]
    assert prompts[0][:6] == prompts[2][:6]
    assert prompts[0][6:9] != prompts[2][6:9]
    assert prompts[1][:7] == prompts[3][:7]
    assert len({tuple(prompt[:6]) for prompt in prompts}) == 3


@pytest.mark.slow
def test_a_run_is_written_as_tables_a_trace_and_pictures(model, tmp_path):
    run = replay(llm_of(model), [TimedRequest(0.0, 20, 4)] * 3, progress=False)
    names = {path.name for path in write_run(run, tmp_path / "new", {"rate": 2}, name="sarathi", tbt_slo_s=0.1)}
    assert names >= {"samples.csv", "steps.csv", "summary.json", "trace.json", "tbt.svg", "batches.svg", "stall.svg"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    document = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert document["about"] == {"rate": 2}
    assert document["metrics_s"]["tbt"]["count"] == 9
    assert document["replicas"][0]["decode_tokens"] == 9
    assert len((tmp_path / "new" / "samples.csv").read_text().splitlines()) == 4
    json.loads((tmp_path / "new" / "trace.json").read_text())
    assert all(path.stat().st_size < 300_000 for path in (tmp_path / "new").glob("*.svg"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tests.tiny_tokenizers import VOCAB_SIZE, write_tiny_tokenizer

    folder = write_tiny_model("llama2", tmp_path_factory.mktemp("tiny"), changes={"vocab_size": VOCAB_SIZE})
    write_tiny_tokenizer(folder)
    return folder


SIZES = ("--max_model_len=512", "--max_num_seqs=8", "--token_buckets=16,64", "--block_size=8", "--num_blocks=256")


@pytest.mark.slow
def test_bench_serves_a_workload_in_this_process(tiny, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the old house stood at the end of a long road " * 50)
    load = (
        "--lengths=uniform:10-600:2-12",
        "--rate=40",
        "--num_requests=12",
        f"--out={tmp_path / 'out'}",
        "--slo_ms=500",
    )
    assert main(["main.py", "bench", f"--model={tiny}", f"--texts={texts}", *load, *SIZES]) == 0
    printed = capsys.readouterr()
    assert "12 arrived, 12 ended" in printed.out
    assert "promise" in printed.out
    assert "scaled from 612 to 512" in printed.err
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert document["requests"]["ended"] == 12
    assert (tmp_path / "out" / "batches.svg").exists()


@pytest.mark.slow
def test_bench_measures_a_server(tiny, tmp_path, capsys):
    load = ("--lengths=fixed:20:6", "--rate=20", "--num_requests=8", f"--out={tmp_path / 'out'}", "--slo_ms=5000")
    with started(serve(tiny, "--api_key=key")) as server:
        command = ["main.py", "bench", f"--url={server.url}/v1", f"--model={tiny}", *load]
        assert main([*command, "--api_key=key"]) == 0
        printed = capsys.readouterr()
        assert "8 arrived, 8 ended" in printed.out
        assert "kept" in printed.out
        assert main(command) == 1
        assert "401" in capsys.readouterr().err
        assert main([*command, "--api_key=key", "--served_model=other"]) == 1
        assert "serves tiny, not 'other'" in capsys.readouterr().err
        late = ["--lengths=fixed:20:480", "--arrivals=static", "--num_requests=32", "--time_limit_s=0.4"]
        command = ["main.py", "bench", f"--url={server.url}", f"--model={tiny}", "--api_key=key", *late]
        assert main(command) == 0
        assert "0 failed or given up" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert document["metrics_s"]["tbt"]["count"] == 8 * 5
    assert document["replicas"] == []


@pytest.mark.slow
def test_profile_writes_a_table_that_can_be_read(tiny, tmp_path, capsys):
    from sarathi_jax.latency import LatencyTable

    out, picture = tmp_path / "table.json", tmp_path / "table.svg"
    assert main(["main.py", "profile", f"--model={tiny}", f"--out={out}", f"--picture={picture}", *SIZES]) == 0
    assert "bucket" in capsys.readouterr().out
    assert LatencyTable.load(out).buckets == (16, 64)
    assert picture.exists()
    assert main(["main.py", "profile", f"--model={tiny}", f"--out={out}", "--serve_s=0.2", *SIZES]) == 0
    assert "in service: " in capsys.readouterr().out
    assert LatencyTable.load(out).idle_s > 0
