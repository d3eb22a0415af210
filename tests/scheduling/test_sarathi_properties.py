"""Properties of the scheduler over random arrivals, lengths, stops and aborts, with and without overlap."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarathi_jax.scheduling.plan import Demand, FillToEdge
from tests.scheduling.drive import Drive, expected_tokens
from tests.scheduling.random_cases import BUCKETS, FEWER, MANY, PIPELINE, cases, cases_of


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


@FEWER
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


@FEWER
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
        limit = FillToEdge(buckets, flat_tokens=flat_tokens)(Demand(num_decodes, ((0, num_prefill_tokens),)))
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
