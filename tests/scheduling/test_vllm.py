"""Schedules of the prefill-first policy, drawn as timelines, and what it refuses."""

import pytest

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.scheduling.vllm import VllmScheduler
from tests.scheduling.drive import Arrival, Case, Drive, drawn, make_sequence, timeline


def case_of(*arrivals: Arrival, num_blocks: int = 64, **changes) -> Case:
    return Case(arrivals, num_blocks, policy="vllm", **changes)


def test_a_prompt_stalls_every_decode():
    # Prompts 1 and 2 do not fit into one step of 16, so 0 gets no token in two steps in a row.
    case = case_of(Arrival(6, 5), Arrival(15, 3, step=3), Arrival(9, 2, step=3), Arrival(4, 2, step=4))
    assert timeline(case) == drawn("""
        bucket   8  4  4 16 16  4  4
        seq 0    6  d  d  .  .  d  d
        seq 1    .  .  . 15  .  d  d
        seq 2    .  .  .  .  9  d  .
        seq 3    .  .  .  .  4  d  .
    """)


def test_out_of_blocks_preempts_the_latest_arrival():
    # 4 blocks of 4 tokens. 1 is computed again in one go, the five tokens that it had drawn too.
    assert timeline(case_of(Arrival(3, 9), Arrival(4, 6), num_blocks=4)) == drawn("""
        bucket   8  4  4  4  4  4  4  4  4 16
        seq 0    3  d  d  d  d  d  d  d  d  .
        seq 1    4  d  d  d  d  x  .  .  .  9
    """)


def test_what_outgrew_the_largest_step_is_computed_again_in_pieces():
    # 2 had drawn six tokens: the eleven follow in two steps, in which 0 gets no token.
    case = case_of(Arrival(3, 13), Arrival(4, 9), Arrival(5, 9), num_blocks=8, buckets=(4, 8))
    assert timeline(case) == drawn("""
        bucket   8  8  4  4  4  4  4  4  4  4  8  4  4  4  4  4
        seq 0    3  .  d  d  d  d  d  d  d  d  .  .  d  d  d  d
        seq 1    4  .  d  d  d  d  d  d  d  d  .  .  .  .  .  .
        seq 2    .  5  d  d  d  d  d  x  .  .  8  3  d  d  .  .
    """)


def test_rows_limit_admission():
    case = case_of(*[Arrival(2, 3)] * 5, buckets=(2, 4), max_num_seqs=3)
    assert timeline(case) == drawn("""
        bucket   4  2  4  4  4  2  2
        seq 0    2  .  d  d  .  .  .
        seq 1    2  .  d  d  .  .  .
        seq 2    .  2  d  d  .  .  .
        seq 3    .  .  .  .  2  d  d
        seq 4    .  .  .  .  2  d  d
    """)


def test_a_pipeline_takes_prompts_and_decodes_by_turns():
    # Two stages: two groups of two sequences, until prompt 4 makes the second wait. Steps of 16 tokens and of 2 are in
    # the pipeline together, so one stage idles most of the time that the other needs.
    case = case_of(*[Arrival(4, 4)] * 4, Arrival(16, 3, step=3), buckets=(2, 4, 8, 16), max_num_seqs=5, num_stages=2)
    assert timeline(case) == drawn("""
        bucket   8  8  2 16  2  4  2  4  0  2
        seq 0    4  .  d  .  d  .  d  .  .  .
        seq 1    4  .  d  .  d  .  d  .  .  .
        seq 2    .  4  .  .  .  d  .  d  .  d
        seq 3    .  4  .  .  .  d  .  d  .  d
        seq 4    .  .  . 16  .  d  .  d  .  .
    """)


@pytest.mark.parametrize(("num_seqs", "num_stages"), [(9, 4), (3, 4), (8, 3), (2, 2), (13, 2)])
def test_a_burst_is_dealt_out_evenly(num_seqs, num_stages):
    drive = Drive(case_of(*[Arrival(1, 9)] * num_seqs, buckets=(16,), max_num_seqs=13, num_stages=num_stages)).run()
    sizes = [len(plan.chunks) if plan else 0 for plan in drive.plans[: 2 * num_stages]]
    assert sizes[:num_stages] == sizes[num_stages:]
    assert sum(sizes[:num_stages]) == num_seqs
    assert max(sizes) == -(-num_seqs // num_stages)


def test_a_prompt_longer_than_the_largest_step_is_refused():
    scheduler = VllmScheduler(
        BlockPool(64), block_size=4, buckets=(4, 16), max_num_seqs=4, window=None, max_model_len=64
    )
    assert (scheduler.longest_prompt, scheduler.longest_sequence) == (16, 64)
    scheduler.add(make_sequence(0, 16, 4))
    with pytest.raises(ValueError, match="17 tokens exceeds the largest step of 16.*token_budget to 17.*sarathi"):
        scheduler.add(make_sequence(1, 17, 4))
    with pytest.raises(ValueError, match="65 tokens exceed max_model_len=64"):
        scheduler.add(make_sequence(2, 4, 61))
    assert (scheduler.num_waiting, repr(scheduler)) == (
        1,
        "VllmScheduler(0 running, 1 waiting, BlockPool(64 of 64 free))",
    )
