"""Properties of the scheduler over random arrivals, lengths, stops and aborts, with and without overlap."""

import collections

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sarathi_jax.scheduling.plan import FillToEdge
from tests.scheduling.drive import Arrival, Case, Drive, expected_tokens

# Few cases in `make check`, over a thousand in the whole suite.
MANY = pytest.mark.parametrize("num_cases", [35, pytest.param(400, marks=pytest.mark.slow)])


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
    return draw(st.sampled_from([None, fill, lambda num_decodes, num_prefill_tokens: fixed]))


@st.composite
def cases(draw, *, slack: str, windowed: bool = False, stages=(1,)):
    """`slack`: blocks for everything at once (ample) or little more than the longest sequence needs (tight)."""
    requests, block_size, buckets = draw(arrivals()), draw(st.sampled_from([1, 2, 3, 4, 8])), draw(BUCKETS)
    case = Case(
        requests,
        num_blocks=1,
        block_size=block_size,
        buckets=buckets,
        max_num_seqs=draw(st.integers(1, 10) | st.integers(4, 10)),
        window=draw(st.sampled_from([1, 2, 5, 8, 16, 30])) if windowed else None,
        num_ahead=draw(st.sampled_from([0, 0, 1, 1, 1, 2, 4])),
        num_stages=draw(st.sampled_from(stages)),
        chooser=draw(choosers(buckets)),
    )
    scheduler = Drive(case).scheduler
    needs = [scheduler.max_blocks(request.num_prompt + request.max_tokens - 1) for request in requests]
    if slack == "tight":
        num_blocks = max(1, *needs) + draw(st.integers(0, 4))
    else:
        num_blocks = sum(needs) + 2 + sum(needs) // 50
    return Case(**{**vars(case), "num_blocks": num_blocks})


@MANY
def test_tight_memory(num_cases):
    seen = collections.Counter()

    @cases_of(num_cases)
    @given(cases(slack="tight"))
    def check(case):
        drive = Drive(case).run()
        seen["preempting"] += drive.num_preemptions > 0
        seen["preempting ahead"] += drive.num_preemptions > 0 and case.num_ahead > 0

    check()
    assert seen["preempting"] >= num_cases // 4
    assert seen["preempting ahead"] >= num_cases // 8


@MANY
def test_sliding_window(num_cases):
    seen = collections.Counter()

    @cases_of(num_cases)
    @given(cases(slack="tight", windowed=True))
    def check(case):
        drive = Drive(case).run()
        seen["preempting"] += drive.num_preemptions > 0
        seen["longer than the window"] += any(a.num_prompt > case.window for a in case.arrivals)

    check()
    assert seen["preempting"] >= num_cases // 10
    assert seen["longer than the window"] >= num_cases // 3


@MANY
def test_ample_memory_follows_algorithm_3_exactly(num_cases):
    @cases_of(num_cases)
    @given(cases(slack="ample"))
    def check(case):
        drive = Drive(case)
        schedule = drive.scheduler.schedule

        def compared():
            expected = expected_tokens(drive)
            plan = schedule()
            chunks = () if plan is None else plan.chunks
            assert {chunk.seq_id: chunk.length for chunk in chunks} == expected
            return plan

        drive.scheduler.schedule = compared
        drive.run()
        assert not drive.num_preemptions

    check()


PIPELINE = (2, 2, 3, 4)


@MANY
@pytest.mark.parametrize("windowed", [False, True])
def test_pipeline_in_tight_memory(num_cases, windowed):
    seen = collections.Counter()

    @cases_of(num_cases)
    @given(cases(slack="tight", windowed=windowed, stages=PIPELINE))
    def check(case):
        drive = Drive(case).run()
        seen["preempting"] += drive.num_preemptions > 0

    check()
    assert seen["preempting"] >= num_cases // 10


@MANY
def test_pipeline_in_ample_memory(num_cases):
    seen = collections.Counter()

    @cases_of(num_cases)
    @given(cases(slack="ample", stages=PIPELINE))
    def check(case):
        drive = Drive(case).run()
        assert not drive.num_preemptions
        assert drive.longest_wait <= 2 * case.num_stages
        seen["settled"] += drive.max_settled >= 3 * case.num_stages

    check()
    assert seen["settled"] >= num_cases // 4


def test_fill_to_edge():
    @cases_of(500)
    @given(BUCKETS, st.integers(0, 120), st.integers(0, 300), st.sampled_from([0, 8, 64]))
    def check(buckets, num_decodes, num_prefill_tokens, flat_tokens):
        num_decodes = min(num_decodes, buckets[-1])
        limit = FillToEdge(buckets, flat_tokens=flat_tokens)(num_decodes, num_prefill_tokens)
        demand = num_decodes + num_prefill_tokens
        assert limit in buckets
        assert limit >= num_decodes
        fits = [bucket for bucket in buckets if bucket >= demand]
        if not fits:
            assert limit == buckets[-1]
            return
        assert limit <= fits[0], "a larger bucket than anyone asked for"
        if limit < demand:
            assert fits[0] > flat_tokens
            assert 2 * (limit - num_decodes) >= num_prefill_tokens, "the prefill drips"
            assert demand < 0.75 * fits[0]

    check()
