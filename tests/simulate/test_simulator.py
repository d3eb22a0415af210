"""The simulator: times against arithmetic, the same run every time, replicas, and prefill and decode apart."""

import dataclasses
import functools
import itertools
from typing import Any

import pytest

from sarathi_jax.config import ConfigError, EngineConfig
from sarathi_jax.latency import DEVICES, LatencyTable, Link, Spread, Timing, Work, chunk_keys
from sarathi_jax.request import RequestError
from sarathi_jax.resources import config_path
from sarathi_jax.scheduling.plan import Chunk, StepPlan
from sarathi_jax.simulate import Deployment, Disaggregated, Snapshot, simulate, simulate_disaggregated
from sarathi_jax.simulate.executor import SimulatedClock, SimulatedExecutor
from sarathi_jax.weights.directory import load_model_yaml
from sarathi_jax.workloads import TimedRequest, Workload, poisson, uniform

MISTRAL = load_model_yaml(config_path("models", "mistral-7b"))


def deployment(**settings: Any) -> Deployment:
    defaults = {"token_budget": 512, "max_num_seqs": 64, "block_size": 16, "max_model_len": 8192, "overlap": False}
    return Deployment(MISTRAL, DEVICES["a100-80gb"], EngineConfig(**defaults | settings))


def workload(rate: float, number: int, seed: int = 0) -> list[TimedRequest]:
    lengths = functools.partial(uniform, (10, 1500), (1, 60))
    return Workload(lengths, functools.partial(poisson, rate), number, seed).requests()


def test_a_request_alone_takes_what_its_steps_take():
    one = deployment()
    run = simulate([TimedRequest(3.0, 712, 4)], one)
    roofline = one.roofline()
    prefill = [roofline.work_s(Work(512, 0, 0, chunk_keys(0, 512), 1))]
    prefill += [roofline.work_s(Work(256, 0, 0, chunk_keys(512, 200), 1))]
    decodes = [roofline.work_s(Work(1, 1, 713 + i, 0, 1)) for i in range(3)]
    [sample] = run.samples
    assert sample.arrival_s == sample.first_scheduled_s == 3.0
    assert sample.ttft_s == pytest.approx(sum(prefill))
    assert sample.tbts_s == pytest.approx(decodes)
    assert run.end_s == sample.finished_s == pytest.approx(3 + sum(prefill) + sum(decodes))
    assert [step.plan.bucket for step in run.steps[0]] == [512, 256, 1, 1, 1]


def test_steps_scatter_as_the_table_says():
    timings = [Timing(8, n, n, 1 - n, 0.01) for n in (0, 1)]
    table = LatencyTable(timings, spreads=[Spread(8, False, (-0.005, 0.005, -0.02))])
    scattered = dataclasses.replace(deployment(token_buckets=(8,)), table=table)
    runs = [simulate([TimedRequest(0.0, 8, 100)], scattered, seed=seed) for seed in (0, 0, 1)]
    assert runs[0].samples == runs[1].samples
    assert runs[0].samples != runs[2].samples
    assert {round(tbt_s, 6) for tbt_s in runs[0].samples[0].tbts_s} == {0.005, 0.015}, "half as long at least"
    assert runs[0].samples[0].ttft_s == pytest.approx(0.01), "steps with prompts do not"


def test_eager_stacks_do_not_pad():
    run = simulate([TimedRequest(0.0, 300, 1)], dataclasses.replace(deployment(token_buckets=(512,)), pads=False))
    work = Work(300, 0, 0, chunk_keys(0, 300), 1)
    assert run.samples[0].ttft_s == pytest.approx(deployment().roofline().work_s(work))


def test_a_measured_table_goes_before_the_roofline():
    timings = [Timing(bucket, n, 1, 1 - n, bucket / 1000) for bucket in (8, 64) for n in (0, 1)]
    timings = [dataclasses.replace(timing, num_decode_keys=timing.num_decodes) for timing in timings]
    table = LatencyTable(timings)
    measured = dataclasses.replace(deployment(token_buckets=(8, 64)), table=table)
    [sample] = simulate([TimedRequest(0.0, 64, 3)], measured).samples
    assert sample.ttft_s == pytest.approx(0.064)
    assert sample.tbts_s == pytest.approx([0.008, 0.008])


@pytest.mark.parametrize("policy", ["sarathi", "vllm"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"overlap": True}, marks=pytest.mark.slow),
        pytest.param({"pp": 2}, marks=pytest.mark.slow),
        pytest.param({"num_blocks": 110}, marks=pytest.mark.slow),
        pytest.param({"dp": 3}, marks=pytest.mark.slow),
    ],
)
def test_everything_ends_and_is_the_same_again(policy: str, settings: dict[str, Any]):
    requests = workload(rate=20, number=60)
    one = deployment(policy=policy, token_budget=2048, **settings)
    run, again = (simulate(requests, one) for _ in range(2))
    assert run == again
    for sample, request in zip(run.samples, requests, strict=True):
        assert len(sample.token_s) == request.output
        assert sample.arrival_s == request.arrival_s <= sample.first_scheduled_s < sample.token_s[0]
        assert all(gap >= 0 for gap in sample.tbts_s)
    for steps in run.steps:
        assert all(step.state.num_free_blocks <= step.state.num_blocks for step in steps)
        assert all(later.started_s >= earlier.ended_s - 1e-9 for earlier, later in itertools.pairwise(steps))
    without = simulate(requests, one, keep_steps=False)
    assert [sample.token_s for sample in without.samples] == [sample.token_s for sample in run.samples]
    if settings == {"num_blocks": 110}:
        assert any(sample.num_preemptions for sample in run.samples)


def test_stages_wait_for_each_other():
    """Two stages of 2 and 3 seconds, a send of half a second: a micro-batch follows when the slower one is free."""
    clock = SimulatedClock()
    executor = SimulatedExecutor(lambda plan: ((2.0, 3.0), 0.5), clock, 2)
    plan = StepPlan((Chunk(0, 0, 1, True),), 1, 1)
    handles = [executor.launch(plan) for _ in range(3)]
    done_s = []
    for handle in handles:
        assert handle is not None
        executor.collect(handle)
        done_s.append(clock.now_s())
    # The third one's decodes go on from the tokens of the first, which came at 5.5.
    assert done_s == pytest.approx([5.5, 8.5, 11.5])
    assert executor.busy_s == pytest.approx([6.0, 9.0])
    assert executor.launch(None) is None


def test_who_is_cut_off_counts_as_waiting():
    requests = [TimedRequest(0.1 * i, 4000, 200) for i in range(100)]
    run = simulate(requests, deployment(), limit_s=5.0)
    assert run.end_s == 5.0
    assert len(run.samples) == 50
    assert run.ttfts.longer_than
    assert all(at_s <= 5.2 for sample in run.samples for at_s in sample.token_s)
    looks: list[Snapshot] = []

    def stop(snapshot: Snapshot) -> bool:
        looks.append(snapshot)
        return snapshot.oldest_waiting_s > 2

    stopped = simulate(requests, deployment(), stop=stop)
    assert stopped.end_s == looks[-1].now_s < 10
    assert [look.now_s for look in looks] == [float(i + 1) for i in range(len(looks))]
    assert looks[-1].oldest_waiting_s > 2 >= looks[-2].oldest_waiting_s
    assert looks[-1].num_waiting > 0


@pytest.mark.slow
def test_requests_are_routed():
    groups = [TimedRequest(0.01 * i, 800, 20, group=i % 5, shared=640) for i in range(60)]
    three = deployment(dp=3)

    def hits(routing: Any) -> int:
        return sum(steps[-1].state.num_prefix_hits for steps in simulate(groups, three, routing=routing).steps)

    assert hits("prefix_affinity") > hits("round_robin") > 0
    uneven = [TimedRequest(0.02 * i, 6000 if i % 3 == 0 else 50, 5) for i in range(60)]
    p90 = {
        routing: simulate(uneven, three, routing=routing).ttfts.quantile(0.9)
        for routing in ("round_robin", "least_work")
    }
    assert p90["least_work"] < p90["round_robin"]
    with pytest.raises(ConfigError, match="round_robin, least_work"):
        simulate(groups, three, routing="random")  # pyright: ignore[reportArgumentType]


def test_prefill_and_decode_apart():
    requests = workload(rate=8, number=60)
    together = simulate(requests, deployment(dp=2))
    pools = Disaggregated(deployment(), deployment(), Link(1e-3, 50e9))
    apart = simulate_disaggregated(requests, pools)
    for sample, request in zip(apart.samples, requests, strict=True):
        assert len(sample.token_s) == request.output
        assert sample.finished_s == sample.token_s[-1]
    assert apart.tbts.quantile(0.99) < together.tbts.quantile(0.99)
    prefill, decode = apart.steps
    assert not any(step.plan.num_decodes for step in prefill)
    # Of what came over the link only a last block that is not full is computed again, with the first token.
    assert sum(step.plan.num_tokens - step.plan.num_decodes for step in decode) < 17 * len(requests)
    slow = simulate_disaggregated(requests, dataclasses.replace(pools, link=Link(1e-3, 1e9)))
    assert slow.tbts.quantile(0.99) > apart.tbts.quantile(0.99)
    other = Deployment(dataclasses.replace(MISTRAL, vocab_size=9), DEVICES["a100-80gb"], EngineConfig())
    with pytest.raises(ConfigError, match="different models"):
        simulate_disaggregated(requests, dataclasses.replace(pools, decode=other))


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(RequestError, match="max_model_len"):
        simulate([TimedRequest(0.0, 9000, 1)], deployment())
    small = dataclasses.replace(deployment(max_model_len=4096), device=DEVICES["tpu-v5e"])
    with pytest.raises(ConfigError, match="does not fit"):
        simulate(workload(1, 1), dataclasses.replace(small, model=load_model_yaml(config_path("models", "yi-34b"))))
