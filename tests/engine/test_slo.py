"""The promised time between tokens through the engine, and the table that it rests on."""

import dataclasses

import pytest

from sarathi_jax.config import ConfigError, EngineConfig
from sarathi_jax.latency import LatencyTable, StepTimes, Timing, Work
from sarathi_jax.llm import LLM
from sarathi_jax.request import RequestError
from sarathi_jax.scheduling.plan import KeepPace
from sarathi_jax.telemetry.steps import StepRecord
from sarathi_jax.timing import FILLS, latency_table, measure
from tests.engine.serving import BLOCK_SIZE, MAX_LEN, Parity, Served, build, greedy, prompt_of
from tests.tiny_models import write_tiny_model
from tests.tiny_tokenizers import VOCAB_SIZE


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return build("llama2", tmp_path_factory.mktemp("slo"))


def one_ms_a_token() -> StepTimes:
    return StepTimes(LatencyTable([Timing(b, d, d, 1 - d, b / 1000) for b in (16, 64) for d in (0, 1)]))


class Seen:
    """An observer that keeps the records."""

    def __init__(self):
        self.steps: list[StepRecord] = []
        self.ended: list[str] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_end(self, output) -> None:
        self.ended.append(output.request_id)


def test_a_promised_pace_bounds_the_steps_of_those_who_generate(served):
    """The second prompt is cut into small chunks while the first request generates, and the tokens are the same."""
    asks = [(prompt_of(20), greedy(max_tokens=40)), (prompt_of(120, 1), greedy(max_tokens=4))]
    chooser = KeepPace(one_ms_a_token(), served.config.buckets)
    bench = served.bench(chooser=chooser)
    for i, (prompt, params) in enumerate(asks):
        bench.engine.add_request(str(i), prompt, params, slo_ms=30 if i == 0 else None)
    finished = bench.drain()
    mixed = [plan for plan in bench.plans if plan.num_decodes and plan.num_tokens > plan.num_decodes]
    assert {plan.bucket for plan in mixed} == {16}
    assert bench.plans[0].bucket == 64, "nobody generates yet"
    Parity().check([finished["0"], finished["1"]], served.alone(asks))


def test_without_a_promise_steps_are_as_large_as_the_demand(served):
    chooser = KeepPace(one_ms_a_token(), served.config.buckets)
    bench = served.bench(chooser=chooser)
    bench.run([(prompt_of(20), greedy(max_tokens=40)), (prompt_of(120, 1), greedy(max_tokens=4))])
    assert 64 in {plan.bucket for plan in bench.plans if plan.num_decodes}


def test_priority_goes_before_arrival(served):
    bench = served.bench(max_num_seqs=1)
    for name, priority in (("late", 5), ("first", 0), ("urgent", -1), ("second", 0)):
        bench.engine.add_request(name, prompt_of(10), greedy(max_tokens=2), priority=priority)
    order = []
    while bench.engine.has_work:
        order += [output.request_id for output in bench.step() if output.finished]
    assert order == ["urgent", "first", "second", "late"]


@pytest.mark.parametrize("slo_ms", [0, -1, float("nan"), float("inf"), True, "5"])
def test_a_promise_that_is_no_time_is_refused(served, slo_ms):
    with pytest.raises(RequestError, match="slo_ms"):
        served.bench(chooser=KeepPace(one_ms_a_token(), (16, 64))).engine.add_request("a", [5], greedy(), slo_ms=slo_ms)


def test_a_promise_that_nobody_can_keep_is_refused(served):
    with pytest.raises(RequestError, match="no time between tokens can be promised"):
        served.bench().engine.add_request("a", [5], greedy(), slo_ms=50)
    with pytest.raises(RequestError, match="priority=1.5 must be an integer"):
        served.bench().engine.add_request("a", [5], greedy(), priority=1.5)
    with pytest.raises(ConfigError, match="only the policies sarathi and chunked_only can keep"):
        EngineConfig(policy="vllm", tbt_slo_ms=50)


@pytest.mark.parametrize("overlap", [True, False])
def test_observers_see_every_token_once(served, overlap):
    bench, seen = served.bench(overlap=overlap, num_blocks=12), Seen()
    bench.engine.observe(seen)
    outputs = bench.run([(prompt_of(14 + i, i), greedy(max_tokens=12, n=1 + (i == 2))) for i in range(4)])
    assert sum(output.metrics.num_preemptions for output in outputs) >= 1
    num_tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    assert sum(record.num_drawn for record in seen.steps) == num_tokens == 60
    assert sum(len(record.ttfts_s) for record in seen.steps) == 4
    assert sum(len(record.tbts_s) for record in seen.steps) == 60 - 5
    assert sorted(seen.ended) == ["0", "1", "2", "3"]
    assert [record.plan for record in seen.steps] == bench.plans[: len(seen.steps)]
    ends = [record.ended_s for record in seen.steps]
    assert ends == sorted(ends)
    for earlier, record in zip(seen.steps, seen.steps[1:], strict=False):
        assert record.scheduled_s <= record.launched_s <= record.started_s <= record.ended_s
        assert record.started_s >= earlier.ended_s


def test_every_program_is_timed_at_every_fill(served):
    table = measure(served.config, served.llm.cache_config, served.runner, VOCAB_SIZE, progress=False)
    assert table.buckets == served.config.buckets
    assert len(table.timings) == 3 * len(FILLS) * len(table.buckets)
    fullest = max(timing.num_decode_keys for timing in table.timings)
    assert fullest == 8 * (MAX_LEN - 1)
    assert served.runner.num_late_compiles == 0
    bench = served.bench()
    Parity().check(bench.run([(prompt_of(20), greedy())]), served.alone([(prompt_of(20), greedy())]))


def test_a_bucket_as_long_as_the_context_is_timed_once(served):
    largest = served.config.buckets[-1]
    short = dataclasses.replace(served.llm.cache_config, max_model_len=largest + 1)
    table = measure(served.config, short, served.runner, VOCAB_SIZE, progress=False)
    assert sum(timing.bucket == largest and not timing.num_decodes for timing in table.timings) == 1
    assert table.step_s(Work(largest, num_prefill_keys=5)) > 0


def test_the_table_is_measured_once(served, tmp_path, monkeypatch):
    monkeypatch.setattr("sarathi_jax.timing.use_compile_cache", lambda: tmp_path / "xla")
    arguments = (served.model, served.config, served.llm.cache_config, served.runner)
    first = latency_table(*arguments, progress=False)
    assert latency_table(*arguments, progress=False).timings == first.timings
    (file,) = (tmp_path / "latency").iterdir()
    file.write_text("{}")
    assert latency_table(*arguments, progress=False).timings != first.timings, "a damaged file is replaced"


@pytest.mark.slow
def test_a_library_user_may_ask_for_a_pace(tmp_path, monkeypatch):
    monkeypatch.setattr("sarathi_jax.timing.use_compile_cache", lambda: tmp_path / "cache" / "xla")
    write_tiny_model("llama2", tmp_path / "model", changes={"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2})
    sizes = {"max_model_len": MAX_LEN, "token_buckets": (16, 64), "block_size": BLOCK_SIZE, "num_blocks": 64}
    with LLM(tmp_path / "model", progress=False, tbt_slo_ms=1000, **sizes) as llm:
        outputs = llm.generate([prompt_of(50), prompt_of(90, 1)], greedy(), use_tqdm=False)
        assert llm.num_late_compiles == 0
    with LLM(tmp_path / "model", progress=False, policy="vllm", **sizes) as llm:
        Parity().check(llm.generate([prompt_of(50)], greedy(), use_tqdm=False), outputs[:1])
