"""Properties of every policy over random arrivals, lengths, stops and aborts: `Drive` checks each step."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduling.drive import RESERVING, Case, Drive
from tests.scheduling.random_cases import PIPELINE, cases, cases_of

FEW = pytest.mark.parametrize("num_cases", [6, pytest.param(40, marks=pytest.mark.slow)])
# vllm and sarathi have files of their own, the latter but for the chunks that shrink.
POLICIES = pytest.mark.parametrize(
    "policy", ["sarathi", "orca", "faster_transformer", "chunked_only", "hybrid_only", "fastserve"]
)
STAGES = pytest.mark.parametrize("stages", [(1,), PIPELINE], ids=["one stage", "pipeline"])


def any_cases(**settings) -> st.SearchStrategy[Case]:
    """With and without a window, cached prefixes and a chunk schedule."""
    return st.tuples(st.booleans(), st.booleans()).flatmap(
        lambda drawn: cases(windowed=drawn[0], prefix_caching=drawn[1], scheduled=True, **settings)
    )


@FEW
@POLICIES
@STAGES
def test_tight_memory(num_cases, policy, stages):
    seen = collections.Counter()

    @cases_of(num_cases)
    @given(any_cases(slack="tight", stages=stages, policy=policy))
    def check(case):
        seen["preempting"] += Drive(case).run().num_preemptions > 0

    check()
    if policy not in RESERVING:
        assert seen["preempting"] >= num_cases // 20


@FEW
@POLICIES
@STAGES
def test_ample_memory(num_cases, policy, stages):
    @cases_of(num_cases)
    @given(any_cases(slack="ample", stages=stages, policy=policy))
    def check(case):
        drive = Drive(case).run()
        assert not drive.num_preemptions or policy == "fastserve"  # takes rows, too

    check()
