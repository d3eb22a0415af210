"""Properties of prefix caching over random requests that begin alike: `Drive` checks every block of every step."""

import collections

import pytest
from hypothesis import given

from tests.scheduling.drive import Arrival, Case, Drive, expected_tokens
from tests.scheduling.random_cases import PIPELINE, cases, cases_of

FEW = pytest.mark.parametrize("num_cases", [12, pytest.param(160, marks=pytest.mark.slow)])


@FEW
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("stages", [(1,), PIPELINE], ids=["one stage", "pipeline"])
@pytest.mark.parametrize("policy", ["sarathi", "vllm"])
def test_tight_memory(num_cases, windowed, stages, policy):
    seen = collections.Counter()

    @cases_of(num_cases)
    @given(cases(slack="tight", windowed=windowed, stages=stages, policy=policy, prefix_caching=True))
    def check(case):
        drive = Drive(case).run()
        seen["preempting"] += drive.num_preemptions > 0
        seen["finding"] += drive.num_found > 0
        seen["sharing"] += drive.max_shared > 0

    check()
    assert seen["preempting"] >= num_cases // 20
    assert seen["finding"] >= num_cases // 6
    assert seen["sharing"] >= num_cases // 10


@FEW
def test_ample_memory_follows_algorithm_3_exactly(num_cases):
    """With what is found counted as computed."""

    @cases_of(num_cases)
    @given(cases(slack="ample", prefix_caching=True))
    def check(case):
        drive = Drive(case)
        schedule = drive.scheduler.schedule

        def compared():
            expected = expected_tokens(drive)
            plan = schedule()
            chunks = () if plan is None else plan.chunks
            if case.num_ahead <= 1:
                assert {chunk.seq_id: chunk.length for chunk in chunks} == expected
            return plan

        drive.scheduler.schedule = compared
        drive.run()
        assert not drive.num_preemptions

    check()


@FEW
@pytest.mark.parametrize("policy", ["sarathi", "vllm"])
def test_pipeline_in_ample_memory(num_cases, policy):
    @cases_of(num_cases)
    @given(cases(slack="ample", stages=PIPELINE, policy=policy, prefix_caching=True))
    def check(case):
        assert not Drive(case).run().num_preemptions

    check()


def plan_of(case: Case) -> list[list[tuple[int, int, int]]]:
    plans = Drive(case).run().plans
    return [[(chunk.seq_id, chunk.start, chunk.length) for chunk in plan.chunks] for plan in plans if plan]


def test_a_document_of_1500_tokens():
    """The second question about it computes the question and the block that it begins in."""
    arrivals = (Arrival(1510, 1, num_shared=1500), Arrival(1510, 1, step=5, num_shared=1500))
    case = Case(arrivals, num_blocks=200, block_size=16, buckets=(64, 512), prefix_caching=True)
    assert plan_of(case) == [[(0, 0, 512)], [(0, 512, 512)], [(0, 1024, 486)], [(1, 1488, 22)]]


def test_a_window_needs_only_what_it_sees():
    """The first request's early blocks are gone when the second comes; the last four are enough."""
    arrivals = (
        Arrival(60, 4, num_shared=56),
        Arrival(60, 1, step=15, num_shared=56),
        Arrival(28, 1, 16, num_shared=28),
    )
    case = Case(arrivals, num_blocks=9, block_size=4, buckets=(4, 8), window=14, prefix_caching=True)
    drive = Drive(case).run()
    assert [drive.starts[i] for i in range(3)] == [0, 56, 0]


def running(case: Case, num_steps: int) -> list[int]:
    """Who runs after so many steps."""
    drive = Drive(case)
    for _ in range(num_steps):
        drive.step()
    return [seq.seq_id for seq in drive.scheduler.running]


@pytest.mark.parametrize(("num_blocks", "expected"), [(10, [0]), (11, [0, 1])])
def test_shared_blocks_cost_nothing(num_blocks, expected):
    """The second prompt needs one block beside the eight that it shares, and the watermark of one."""
    arrivals = (Arrival(33, 3, num_shared=32), Arrival(33, 3, step=1, num_shared=32))
    case = Case(arrivals, num_blocks=num_blocks, block_size=4, buckets=(4, 64), prefix_caching=True)
    assert running(case, 2) == expected


@pytest.mark.parametrize(("num_blocks", "expected"), [(13, [0, 1]), (14, [0, 1, 2])])
def test_shared_blocks_count_twice_below_a_window(num_blocks, expected):
    """Two decodes hold three blocks each, two of them in common; the third may come to hold seven of its own."""
    arrivals = (Arrival(33, 9, num_shared=33), Arrival(33, 9, step=3, num_shared=33), Arrival(64, 1, step=4))
    case = Case(arrivals, num_blocks=num_blocks, block_size=4, buckets=(4, 16), window=8, prefix_caching=True)
    assert running(case, 5) == expected
