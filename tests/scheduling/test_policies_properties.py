"""Properties of every policy over random arrivals, lengths, stops and aborts: `Drive` checks each step."""

import collections

import pytest
from hypothesis import given

from tests.scheduling.drive import RESERVING, Drive
from tests.scheduling.random_cases import PIPELINE, cases, cases_of

FEW = pytest.mark.parametrize("num_cases", [10, pytest.param(150, marks=pytest.mark.slow)])
# The others have files of their own.
POLICIES = pytest.mark.parametrize("policy", ["orca", "faster_transformer", "chunked_only", "hybrid_only"])


@FEW
@POLICIES
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("stages", [(1,), PIPELINE], ids=["one stage", "pipeline"])
def test_tight_memory(num_cases, policy, windowed, prefix_caching, stages):
    seen = collections.Counter()

    @cases_of(num_cases)
    @given(cases(slack="tight", windowed=windowed, stages=stages, policy=policy, prefix_caching=prefix_caching))
    def check(case):
        drive = Drive(case).run()
        seen["preempting"] += drive.num_preemptions > 0
        seen["crowded"] += any(plan and len(plan.chunks) > 1 for plan in drive.plans)

    check()
    assert seen["crowded"] > num_cases // 10
    if policy not in RESERVING:
        assert seen["preempting"] >= num_cases // 20


@FEW
@POLICIES
@pytest.mark.parametrize("stages", [(1,), PIPELINE], ids=["one stage", "pipeline"])
def test_ample_memory(num_cases, policy, stages):
    @cases_of(num_cases)
    @given(cases(slack="ample", stages=stages, policy=policy))
    def check(case):
        assert not Drive(case).run().num_preemptions

    check()
