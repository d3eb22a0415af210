"""The same tokens with prefix caching and without, and no token computed twice that the cache still holds."""

import dataclasses

import numpy as np
import pytest

from sarathi_jax.executor import from_message, to_message
from sarathi_jax.parallel.wire import decode, encode
from sarathi_jax.runner import MicroBatch, Wanted
from tests.engine.serving import (
    BLOCK_SIZE,
    TOP,
    Ask,
    Bench,
    Parity,
    Served,
    build,
    drawn,
    greedy,
    prompt_of,
    random_limit,
)

MODELS = ["decoder", pytest.param("windowed", marks=pytest.mark.slow), pytest.param("falcon", marks=pytest.mark.slow)]
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3}

DOCUMENT = prompt_of(61, 7)
"""Seven whole blocks and five tokens of an eighth."""

ASKS: list[Ask] = [
    (DOCUMENT, greedy(max_tokens=12)),
    (DOCUMENT + prompt_of(6, 1), greedy(max_tokens=20)),
    (DOCUMENT + prompt_of(9, 2), drawn(max_tokens=12, temperature=0.8, n=3)),
    (DOCUMENT[:32], drawn(max_tokens=16, seed=3, **PENALTIES)),
    (DOCUMENT + prompt_of(4, 3), greedy(max_tokens=20, **PENALTIES)),
    (DOCUMENT[:40] + prompt_of(20, 4), greedy(max_tokens=8, prompt_logprobs=TOP)),
    (prompt_of(6, 5) + DOCUMENT, greedy(max_tokens=8)),
    (DOCUMENT, drawn(max_tokens=16, n=2, presence_penalty=0.7, top_p=0.9)),
]


@pytest.fixture(params=MODELS)
def served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(request.param)


def run_in_turn(bench: Bench, asks: list[Ask], num_between: int) -> list:
    """Serves requests that come in so many steps after one another."""
    finished = {}
    for i, (prompt, params) in enumerate(asks):
        bench.engine.add_request(str(i), prompt, params)
        for _ in range(num_between):
            finished |= {output.request_id: output for output in bench.step() if output.finished}
    finished |= bench.drain()
    return [finished[str(i)] for i in range(len(asks))]


def num_computed(bench: Bench, since: int = 0) -> int:
    return sum(plan.num_tokens for plan in bench.plans[since:])


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_between", [0, 2, 40])
def test_same_tokens(served: Served, parity: Parity, overlap: bool, num_between: int):
    """All at once, in a crowd where some share blocks with others that run, and after one another."""
    bench = served.bench(overlap=overlap)
    outputs = run_in_turn(bench, ASKS, num_between)
    parity.check(outputs, served.alone(ASKS))
    assert sum(output.metrics.num_cached_tokens for output in outputs) >= (100 if num_between else 0)
    assert served.llm.num_late_compiles == 0


def test_chunked(served: Served, parity: Parity):
    bench = served.bench(chooser=random_limit(3))
    parity.check(run_in_turn(bench, ASKS + ASKS, 3), served.alone(ASKS + ASKS))
    assert bench.scheduler.state.num_prefix_hits > 400


@pytest.mark.parametrize("policy", ["sarathi", "vllm"])
@pytest.mark.parametrize("overlap", [True, False])
def test_preempted(served: Served, parity: Parity, overlap: bool, policy):
    """Few blocks: some are evicted, some are found again by the sequence that lost them."""
    asks = [(prompt[:20], dataclasses.replace(params, max_tokens=50)) for prompt, params in ASKS]
    bench = served.bench(overlap=overlap, num_blocks=13, policy=policy)
    outputs = run_in_turn(bench, asks, 2)
    assert sum(output.metrics.num_preemptions for output in outputs) >= 1
    parity.check(outputs, served.alone(asks))
    assert bench.scheduler.state.num_prefix_hits > 0


def test_prefill_first(served: Served, parity: Parity):
    asks = [ask for ask in ASKS if len(ask[0]) <= served.config.buckets[-1]]
    bench = served.bench(policy="vllm")
    parity.check(run_in_turn(bench, asks, 3), served.alone(asks))
    assert bench.scheduler.state.num_prefix_hits > 100


def test_what_is_computed(decoder: Served):
    """The first request computes everything, the second what differs, the third nothing but its last token."""
    bench = decoder.bench(overlap=False)
    counts, cached = [], []
    for i, prompt in enumerate([DOCUMENT, DOCUMENT + prompt_of(6), DOCUMENT[:33], DOCUMENT[:32]]):
        before = len(bench.plans)
        bench.engine.add_request(str(i), prompt, greedy(max_tokens=1))
        cached.append(bench.drain()[str(i)].metrics.num_cached_tokens)
        counts.append(num_computed(bench, before))
    assert counts == [61, 11, 1, 8]  # the last token is computed always, in whole blocks
    assert cached == [0, 56, 32, 24]
    state = bench.scheduler.state
    assert (state.num_prefix_queries, state.num_prefix_hits) == (61 + 67 + 33 + 32, sum(cached))


def test_answers_are_found_too(decoder: Served):
    """The next turn of a conversation begins with the answer before it."""
    bench = decoder.bench()
    bench.engine.add_request("first", prompt_of(20), greedy(max_tokens=30))
    answer = bench.drain()["first"].outputs[0].token_ids
    bench.engine.add_request("second", prompt_of(20) + list(answer) + prompt_of(5), greedy(max_tokens=1))
    assert bench.drain()["second"].metrics.num_cached_tokens == (20 + 30 - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("params", [greedy(max_tokens=16, **PENALTIES), drawn(max_tokens=16, seed=5, **PENALTIES)])
def test_penalties_know_what_was_not_computed(served: Served, parity: Parity, params):
    """Few tokens, so that every one of them repeats some; another sequence's stand in the device row before."""
    document = [5 + i % 9 for i in range(50)]
    asks = [(document, params), (prompt_of(50), greedy(max_tokens=3)), (document, params)]
    bench = served.bench(max_num_seqs=1)
    outputs = [bench.run([ask])[0] for ask in asks]
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 0, 48]
    parity.check(outputs, served.alone(asks))


def test_prompt_logprobs_compute_every_token(decoder: Served, parity: Parity):
    """They find nothing, but others find what they computed."""
    asks = [(DOCUMENT, greedy(max_tokens=4)), (DOCUMENT, greedy(max_tokens=4, prompt_logprobs=3))]
    bench = decoder.bench()
    outputs = [bench.run([ask])[0] for ask in asks]
    parity.check(outputs, decoder.alone(asks))
    assert outputs[1].metrics.num_cached_tokens == 0
    fresh = decoder.bench()
    assert [fresh.run([ask])[0].metrics.num_cached_tokens for ask in reversed(asks)] == [0, 56]


def test_samples_share_their_prompt(decoder: Served, parity: Parity):
    ask = (prompt_of(100), drawn(max_tokens=8, n=3))
    bench = decoder.bench(overlap=False)
    parity.check(bench.run([ask]), decoder.alone([ask]))
    assert num_computed(bench) < 2 * 100 + 3 * 8


def test_blocks_outlive_an_abort(decoder: Served, parity: Parity):
    ask = (DOCUMENT, greedy(max_tokens=30))
    for moment in range(1, 12):
        bench = decoder.bench()
        bench.engine.add_request("gone", *ask)
        for _ in range(moment):
            bench.step()
        bench.engine.abort("gone")
        bench.check_blocks()
        outputs = bench.run([ask])
        assert outputs[0].metrics.num_cached_tokens == 56
        parity.check(outputs, decoder.alone([ask]))


def test_off(decoder: Served):
    bench = decoder.bench(prefix_caching=False)
    outputs = [bench.run([ASKS[0]])[0] for _ in range(2)]
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 0]
    state = bench.scheduler.state
    assert (bench.pool.num_cached, state.num_prefix_queries, state.num_prefix_hits) == (0, 0, 0)


def test_recalled_rows_reach_the_other_processes():
    recalled = (np.array([1, 2, 3], np.int32), np.array([0, 5, 6], np.int32))
    sent = MicroBatch(16, np.zeros(8, np.int32), {}, Wanted(1), recalled)
    received = from_message(decode(bytearray(encode(to_message(sent)))))
    assert received is not None
    np.testing.assert_array_equal(received.recalled, recalled)


@pytest.mark.slow
def test_a_document_of_1500_tokens(tmp_path, parity: Parity):
    """The second question about it computes the question and what does not fill a block."""
    served = build(
        "llama3.1", tmp_path, changes={"max_position_embeddings": 2048}, max_model_len=1600, token_buckets=(64, 512)
    )
    document = prompt_of(1500)
    asks = [(document + prompt_of(20, key), greedy(max_tokens=4)) for key in range(2)]
    bench = served.bench(overlap=False)
    first = bench.run(asks[:1])
    num_first, num_steps = num_computed(bench), len(bench.plans)
    second = bench.run(asks[1:])
    parity.check(first + second, served.alone(asks))
    assert num_first == 1520 + 3
    assert num_computed(bench, num_steps) == 20 + 1500 % BLOCK_SIZE + 3
    assert bench.plans[num_steps].bucket == 64


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize(("name", "tp"), [("mistral", 1), ("falcon-40b", 2)])
def test_in_a_pipeline(tmp_path, parity: Parity, name: str, tp: int):
    """The last stage recalls history that only the first one's host knows."""
    changes = {"num_attention_heads": 8, "hidden_size": 128, "num_hidden_layers": 4}
    one, piped = build(name, tmp_path / "one", changes=changes), build(name, tmp_path, changes=changes, pp=2, tp=tp)
    asks = [(prompt[:62], params) for prompt, params in ASKS]
    for settings in ({}, {"num_blocks": 24}, {"overlap": False}, {"policy": "vllm"}):
        bench = piped.bench(**settings)
        parity.check(run_in_turn(bench, asks, 5), one.alone(asks))
        assert bench.scheduler.state.num_prefix_hits > 100
    assert piped.llm.num_late_compiles == 0
