"""Random arrivals, lengths, stops, aborts, memory, buckets and pipelines, for the property tests of all policies."""

import dataclasses

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sarathi_jax.config import CHUNKING, Policy
from sarathi_jax.scheduling.plan import ChunkSchedule, FillToEdge
from tests.scheduling.drive import RESERVING, Arrival, Case, Drive

# Few cases in `make check`, over two thousand in the whole suite.
MANY = pytest.mark.parametrize("num_cases", [35, pytest.param(400, marks=pytest.mark.slow)])
FEWER = pytest.mark.parametrize("num_cases", [20, pytest.param(200, marks=pytest.mark.slow)])


def cases_of(num_cases: int):
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=num_cases, derandomize=True, deadline=None, database=None, suppress_health_check=health
    )


@st.composite
def arrivals(draw):
    # All kinds of mixtures: long prompts with short answers, and the reverse, which runs out of blocks.
    max_prompt, max_output = draw(st.sampled_from([(40, 12), (12, 30), (5, 40)]))
    one = st.builds(
        Arrival,
        num_prompt=st.integers(1, max_prompt),
        max_tokens=st.integers(1, max_output) | st.just(max_output),
        step=st.just(0) | st.integers(0, 20),
        stops_at=st.none() | st.none() | st.integers(1, max_output),
        aborts_after=st.none() | st.none() | st.integers(0, 30),
    )
    return tuple(
        sorted(
            draw(st.lists(one, min_size=draw(st.sampled_from([1, 4, 6])), max_size=9)), key=lambda arrival: arrival.step
        )
    )


BUCKETS = st.sampled_from([(1, 2, 4, 8, 16), (4, 8, 16), (3, 5, 11), (8,), (1,), (2,), (16, 64, 100), (1, 40)])


@st.composite
def choosers(draw, buckets):
    fixed = draw(st.integers(0, buckets[-1] + 3))
    fill = FillToEdge(buckets, min_fill=draw(st.sampled_from([0.5, 0.75, 1.0])), flat_tokens=0)
    return draw(st.sampled_from([None, fill, lambda demand: fixed]))


@st.composite
def cases(
    draw,
    *,
    slack: str,
    windowed: bool = False,
    stages=(1,),
    policy: Policy = "sarathi",
    prefix_caching: bool = False,
    scheduled: bool = False,
):
    """`slack`: blocks for everything at once (ample) or little more than the longest sequence needs (tight).

    `prefix_caching`: with requests of which some begin alike, even go on alike.
    `scheduled`: with chunks that shrink, where the policy cuts any.
    """
    requests, block_size, buckets = draw(arrivals()), draw(st.sampled_from([1, 2, 3, 4, 8])), draw(BUCKETS)
    if policy not in CHUNKING:
        requests = tuple(dataclasses.replace(r, num_prompt=min(r.num_prompt, buckets[-1])) for r in requests)
    if prefix_caching:
        shared = st.just(0) | st.integers(1, 60) | st.just(60)
        requests = tuple(dataclasses.replace(r, num_shared=draw(shared)) for r in requests)
    case = Case(
        requests,
        num_blocks=1,
        block_size=block_size,
        buckets=buckets,
        max_num_seqs=draw(st.integers(1, 10) | st.integers(4, 10)),
        window=draw(st.sampled_from([1, 2, 5, 8, 16, 30])) if windowed else None,
        num_ahead=draw(st.sampled_from([0, 0, 1, 1, 1, 2, 4])),
        num_stages=draw(st.sampled_from(stages)),
        chooser=draw(choosers(buckets)) if policy in CHUNKING else None,
        policy=policy,
        prefix_caching=prefix_caching,
    )
    if scheduled and policy in CHUNKING and (most_decodes := -(-case.max_running // case.num_stages)) < buckets[-1]:
        low, high = sorted(draw(st.tuples(*[st.integers(most_decodes + 1, buckets[-1])] * 2)))
        schedule = ChunkSchedule(high, low, draw(st.integers(1, 4)), draw(st.integers(1, 40)))
        case = dataclasses.replace(case, chunk_schedule=schedule)
    scheduler = Drive(case).scheduler
    needs = [scheduler.max_blocks(request.num_prompt + request.max_tokens - 1) for request in requests]
    if slack == "tight":
        num_blocks = max(1, *needs) * draw(st.integers(1, 6 if policy in RESERVING else 1)) + draw(st.integers(0, 4))
    else:
        num_blocks = sum(needs) + 2 + sum(needs) // 50
    return dataclasses.replace(case, num_blocks=num_blocks)


PIPELINE = (2, 2, 3, 4)
