"""Properties of the prefill-first policy over random arrivals, lengths, stops and aborts."""

import collections

import pytest
from hypothesis import given

from tests.scheduling.drive import Drive, expected_whole_prompts
from tests.scheduling.random_cases import FEWER, PIPELINE, cases, cases_of


@FEWER
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("stages", [(1,), PIPELINE], ids=["one stage", "pipeline"])
def test_tight_memory(num_cases, windowed, stages):
    seen = collections.Counter()

    @cases_of(num_cases)
    @given(cases(slack="tight", windowed=windowed, stages=stages, policy="vllm"))
    def check(case):
        drive = Drive(case).run()
        seen["preempting"] += drive.num_preemptions > 0
        seen["pieces"] += any(not chunk.samples for plan in drive.plans if plan for chunk in plan.chunks)

    check()
    assert seen["preempting"] >= num_cases // 20
    assert seen["pieces"] >= num_cases // 50


@FEWER
def test_ample_memory_is_prefill_first_exactly(num_cases):
    @cases_of(num_cases)
    @given(cases(slack="ample", policy="vllm"))
    def check(case):
        drive = Drive(case)
        schedule = drive.scheduler.schedule

        def compared():
            expected = expected_whole_prompts(drive)
            plan = schedule()
            chunks = () if plan is None else plan.chunks
            assert {chunk.seq_id: chunk.length for chunk in chunks} == expected
            return plan

        drive.scheduler.schedule = compared
        drive.run()
        assert not drive.num_preemptions

    check()


@FEWER
def test_pipeline_in_ample_memory(num_cases):
    @cases_of(num_cases)
    @given(cases(slack="ample", stages=PIPELINE, policy="vllm"))
    def check(case):
        assert not Drive(case).run().num_preemptions

    check()
