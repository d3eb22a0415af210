"""The same tokens however a request is served: chunked, in a crowd, overlapped, preempted, in any buckets."""

import dataclasses

import pytest

from sarathi_jax.config import POLICIES, Policy
from sarathi_jax.request import SamplingParams
from tests.engine.serving import TOP, Ask, Parity, Served, at_most, build, drawn, greedy, prompt_of, random_limit

MODELS = ["decoder", pytest.param("windowed", marks=pytest.mark.slow), pytest.param("falcon", marks=pytest.mark.slow)]


@pytest.fixture(params=MODELS)
def served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(request.param)


CROWD: list[Ask] = [
    (prompt_of(5), greedy(max_tokens=24)),
    (prompt_of(60), drawn(max_tokens=20, temperature=0.8, prompt_logprobs=TOP)),
    (prompt_of(1), drawn(max_tokens=24, top_k=30)),
    (prompt_of(33), greedy(max_tokens=24, repetition_penalty=1.3, frequency_penalty=0.2, prompt_logprobs=2)),
    (prompt_of(41), drawn(max_tokens=16, n=3, top_p=0.9, presence_penalty=0.5)),
    (prompt_of(64), greedy(max_tokens=12, prompt_logprobs=0)),
    (prompt_of(17), drawn(max_tokens=24, temperature=1.3, min_p=0.02, logit_bias={7: 3.0, 9: -50.0})),
    (prompt_of(9), greedy(max_tokens=20, n=2, logprobs=0, min_tokens=5, ignore_eos=False)),
    (prompt_of(26), drawn(max_tokens=24, repetition_penalty=1.2, seed=3)),
]
"""Prompts up to the largest bucket, so that the reference computes each of them in one step."""

PRESSED: list[Ask] = [
    (prompt_of(6), greedy(max_tokens=50, prompt_logprobs=TOP)),
    (prompt_of(14), drawn(max_tokens=50, temperature=0.9, prompt_logprobs=3)),
    (prompt_of(3), drawn(max_tokens=45, n=3, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=5)),
    (prompt_of(20), greedy(max_tokens=40, repetition_penalty=1.5, presence_penalty=0.4)),
    (prompt_of(30), drawn(max_tokens=30, top_k=20, top_p=0.8, min_tokens=30, ignore_eos=False)),
]
"""Short prompts and long outputs: all of them start, then their growth takes each other's blocks."""


@pytest.mark.parametrize("limit", [4, 7, 16])
def test_chunked_as_unchunked(served: Served, parity: Parity, limit: int):
    for ask in CROWD[:6]:
        bench = served.bench(overlap=False, max_num_seqs=1, chooser=at_most(limit))
        parity.check(bench.run([ask]), served.alone([ask]))
        assert len(bench.plans) >= len(ask[0]) // max(limit, served.config.buckets[0])


def test_crowd_as_alone(served: Served, parity: Parity):
    parity.check(served.bench(overlap=False).run(CROWD), served.alone(CROWD))


def test_overlapped_as_synchronous(served: Served, parity: Parity):
    parity.check(served.bench(overlap=True).run(CROWD), served.bench(overlap=False).run(CROWD))


def test_random_chunks_and_arrivals(served: Served, parity: Parity):
    """Requests join and chunks end anywhere."""
    bench = served.bench(chooser=random_limit(5))
    finished = {}
    for i, (prompt, params) in enumerate(CROWD):
        bench.engine.add_request(str(i), prompt, params)
        for _ in range(i % 4):
            finished |= {output.request_id: output for output in bench.step() if output.finished}
    finished |= bench.drain()
    parity.check([finished[str(i)] for i in range(len(CROWD))], served.alone(CROWD))


@pytest.mark.parametrize("overlap", [True, False])
def test_preempted_as_undisturbed(served: Served, parity: Parity, overlap: bool):
    outputs = served.bench(overlap=overlap, num_blocks=13).run(PRESSED)
    assert sum(output.metrics.num_preemptions for output in outputs) >= 3
    parity.check(outputs, served.alone(PRESSED))


def test_preempted_in_the_middle_of_a_prompt(served: Served, parity: Parity):
    """Small chunks, so that what is recomputed spans many steps, and prompts that are under way lose their blocks."""
    bench = served.bench(num_blocks=13, chooser=random_limit(8))
    outputs = bench.run(PRESSED + CROWD[:3])
    assert sum(output.metrics.num_preemptions for output in outputs) >= 3
    parity.check(outputs, served.alone(PRESSED + CROWD[:3]))


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_every_policy_as_sarathi(decoder: Served, parity: Parity, policy: Policy, overlap: bool):
    """In memory that makes those preempt that ever do."""
    for num_blocks in (14, 40):
        asks = CROWD if num_blocks == 40 else PRESSED
        parity.check(
            decoder.bench(policy=policy, overlap=overlap, num_blocks=num_blocks).run(asks), decoder.alone(asks)
        )


@pytest.mark.parametrize("buckets", [(64,), (4, 64), (16,), (4,)])
def test_any_buckets(decoder: Served, parity: Parity, buckets: tuple[int, ...]):
    parity.check(decoder.bench(buckets=buckets).run(CROWD), decoder.alone(CROWD))


@pytest.mark.slow
def test_buckets_between_powers_of_two(decoder: Served, tmp_path, parity: Parity):
    odd = build("llama3.1", tmp_path, token_buckets=(1, 7, 27))
    parity.check(odd.bench().run(CROWD), decoder.alone(CROWD))


def test_sample_alone_is_the_same_sample(decoder: Served, parity: Parity):
    """Sample i of n does not depend on n: fewer samples are the first ones of more."""
    many, few = (decoder.alone([(prompt_of(12), drawn(n=n, max_tokens=12))])[0] for n in (4, 2))
    parity.check([dataclasses.replace(many, outputs=many.outputs[:2])], [few])
    assert len({sample.token_ids for sample in many.outputs}) == 4


def test_unseeded_samples_differ_between_requests(decoder: Served):
    ask = (prompt_of(12), SamplingParams(max_tokens=12, ignore_eos=True))
    outputs = decoder.bench().run([ask] * 4)
    assert len({output.outputs[0].token_ids for output in outputs}) == 4
