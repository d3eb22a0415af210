"""What is planned is what is served: the simulator plans the very steps that the engine runs."""

import dataclasses
from typing import Any

import pytest

from sarathi_jax.latency import DEVICES
from sarathi_jax.request import SamplingParams
from sarathi_jax.simulate import Deployment, simulate
from sarathi_jax.workloads import TimedRequest
from tests.engine.serving import MAX_SEQS, Served

LENGTHS = ((5, 9), (120, 30), (64, 12), (1, 40), (33, 33), (70, 5), (16, 20), (90, 60), (12, 3), (50, 50))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sarathi", "vllm"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("blocks", ["ample", "few"])
def test_the_same_plans(decoder: Served, policy: Any, overlap: bool, blocks: str):
    num_blocks = {"ample": 4096, "few": 25 if policy == "sarathi" else 14}[blocks]
    lengths = [(prompt, output) for prompt, output in LENGTHS if policy == "sarathi" or prompt <= 64]
    bench = decoder.bench(policy=policy, overlap=overlap, num_blocks=num_blocks, prefix_caching=False)
    asks = []
    for i, (prompt, output) in enumerate(lengths):
        params = SamplingParams(max_tokens=output, min_tokens=output, ignore_eos=True, temperature=0)
        asks.append(([3 + i] * prompt, params))
    bench.run(asks)
    config = dataclasses.replace(
        decoder.config,
        policy=policy,
        overlap=overlap,
        num_blocks=num_blocks,
        max_num_seqs=MAX_SEQS,
        max_model_len=decoder.llm.cache_config.max_model_len,
        block_size=decoder.llm.cache_config.block_size,
    )
    requests = [TimedRequest(0.0, prompt, output) for prompt, output in lengths]
    run = simulate(requests, Deployment(decoder.model, DEVICES["cpu"], config))
    assert [step.plan for step in run.steps[0]] == list(bench.plans)
    assert (blocks == "few") == any(plan.preempted for plan in bench.plans)
