"""Schedules small enough to read, drawn as timelines, and what the scheduler refuses."""

import pytest

from sarathi_jax.kv.blocks import BlockError, BlockPool
from sarathi_jax.scheduling.plan import FillToEdge
from sarathi_jax.scheduling.sarathi import SarathiScheduler
from tests.scheduling.drive import Arrival, Case, Drive, drawn, make_sequence, timeline

EXACT = FillToEdge((4, 8, 16), flat_tokens=0)


def test_a_long_prompt_never_stalls_a_decode():
    # 16 tokens a step: the decode of 0 and 15 of prompt 1; request 2 fills what prompt 1 leaves, to the edge.
    case = Case((Arrival(6, 8), Arrival(40, 2, step=3), Arrival(9, 3, step=4)), num_blocks=64)
    assert timeline(case) == drawn("""
        bucket   8  4  4 16 16 16  8  4  4
        seq 0    6  d  d  d  d  d  d  d  .
        seq 1    .  .  . 15 15 10  d  .  .
        seq 2    .  .  .  .  .  5  4  d  d
    """)


def test_a_lower_bucket_is_filled_to_its_edge():
    # 1 decode + 10 prompt tokens are 11 of 16: less than 3/4, so 8 exactly and the rest next.
    case = Case((Arrival(3, 5), Arrival(10, 2, step=1)), num_blocks=64, chooser=EXACT)
    assert timeline(case) == drawn("""
        bucket   4  8  4  4  4
        seq 0    3  d  d  d  d
        seq 1    .  7  3  d  .
    """)


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_out_of_blocks_preempts_the_latest_arrival(num_ahead):
    # 4 blocks of 4 tokens: at step 5 sequence 0 wants its third, and 1 has two. 1 comes back once 0 has ended and
    # computes its prompt and the five tokens it had drawn again, in one chunk that draws the sixth.
    case = Case((Arrival(3, 9), Arrival(4, 6)), num_blocks=4, num_ahead=num_ahead)
    assert timeline(case) == drawn("""
        bucket   8  4  4  4  4  4  4  4  4 16
        seq 0    3  d  d  d  d  d  d  d  d  .
        seq 1    4  d  d  d  d  x  .  .  .  9
    """)


def test_rows_limit_admission_and_order_is_kept():
    case = Case(tuple(Arrival(2, 3) for _ in range(5)), num_blocks=64, buckets=(2, 4), max_num_seqs=2)
    assert timeline(case) == drawn("""
        bucket   4  2  2  4  2  2  2  2  2
        seq 0    2  d  d  .  .  .  .  .  .
        seq 1    2  d  d  .  .  .  .  .  .
        seq 2    .  .  .  2  d  d  .  .  .
        seq 3    .  .  .  2  d  d  .  .  .
        seq 4    .  .  .  .  .  .  2  d  d
    """)


def test_a_window_serves_prompts_longer_than_the_cache():
    # 5 blocks of 4 tokens hold 20; a window of 6 and chunks of 8 touch at most 4 blocks at once.
    case = Case((Arrival(30, 4), Arrival(12, 3)), num_blocks=5, window=6, buckets=(4, 8))
    assert timeline(case) == drawn("""
        bucket   8  8  8  8  4  4  4  8  4  4  4
        seq 0    8  8  8  6  d  d  d  .  .  .  .
        seq 1    .  .  .  .  .  .  .  8  4  d  d
    """)


def test_a_stop_is_seen_one_step_late_with_overlap():
    arrivals = (Arrival(4, 9, stops_at=2), Arrival(4, 2, step=1))
    assert timeline(Case(arrivals, num_blocks=64)) == drawn("""
        bucket   4  8  4
        seq 0    4  d  .
        seq 1    .  4  d
    """)
    assert timeline(Case(arrivals, num_blocks=64, num_ahead=1)) == drawn("""
        bucket   4  8  4
        seq 0    4  d  d
        seq 1    .  4  d
    """)


def test_a_pipeline_fills_with_decodes_and_chunks():
    # Three stages: 0 and 1 draw in one step and are back three steps later, one in that step and one in the next.
    # The chunks of prompt 2 follow each other at once.
    case = Case((Arrival(3, 5), Arrival(4, 3), Arrival(30, 3, step=2)), num_blocks=64, buckets=(4, 8), num_stages=3)
    assert timeline(case) == drawn("""
        bucket   8  0  8  8  8  8  8  8  4  4  0  4  4
        seq 0    3  .  .  d  .  .  d  .  .  d  .  .  d
        seq 1    4  .  .  .  d  .  .  d  .  .  .  .  .
        seq 2    .  .  8  7  7  8  .  .  d  .  .  d  .
    """)


def test_a_bucket_serves_a_whole_round():
    # Two stages: prompt 1 comes in the second step of a round, and the bucket of the first bounds it.
    case = Case((Arrival(16, 6), Arrival(9, 3, step=3)), num_blocks=64, num_stages=2, chooser=EXACT)
    assert timeline(case) == drawn("""
        bucket  16  0  4  4  8  0  4  4  4  4  4
        seq 0   16  .  d  .  d  .  d  .  d  .  d
        seq 1    .  .  .  4  5  .  .  d  .  d  .
    """)


def test_a_pipeline_preempts_whose_token_is_on_its_way():
    # Two stages, 4 blocks of 4 tokens: 0 takes the blocks of 1 a step after 1 entered, and 1 comes back with the token
    # that was on its way.
    case = Case((Arrival(4, 7), Arrival(4, 6)), num_blocks=4, num_stages=2)
    assert timeline(case) == drawn("""
        bucket   8  0  4  4  4  4  4  4  4  4  4  0  4  4  8
        seq 0    4  .  d  .  d  .  d  .  d  .  d  .  d  .  .
        seq 1    4  .  .  d  .  d  .  d  .  d  x  .  .  4  5
    """)


def test_a_pipeline_waits_for_blocks_of_those_on_their_way():
    # 3 blocks: 1 cannot go on, but nobody would gain if it lost its block, and once 0 has ended it gets another.
    case = Case((Arrival(4, 4), Arrival(3, 4)), num_blocks=3, num_stages=2)
    assert timeline(case) == drawn("""
        bucket   8  0  4  4  4  0  4  4  0  4
        seq 0    4  .  d  .  d  .  d  .  .  .
        seq 1    3  .  .  d  .  .  .  d  .  d
    """)


@pytest.mark.parametrize(("num_seqs", "num_stages"), [(9, 4), (10, 4), (3, 4), (8, 3), (2, 2), (13, 2)])
def test_decodes_are_shared_out_evenly(num_seqs, num_stages):
    # The bucket of a round is chosen for its largest share, also by a step with a smaller one.
    case = Case(
        tuple(Arrival(1 + i % 3, 30, step=i // 2) for i in range(num_seqs)),
        num_blocks=100,
        buckets=tuple(range(1, 20)),
        max_num_seqs=13,
        num_stages=num_stages,
        chooser=lambda demand: demand.num_decodes + demand.num_prefill_tokens,
    )
    drive = Drive(case).run()
    shares = [plan.num_decodes if plan else 0 for plan in drive.plans[-8 * num_stages : -6 * num_stages]]
    share, num_larger = divmod(num_seqs, num_stages)
    for i in range(num_stages):
        assert sorted(shares[i : i + num_stages]) == [share] * (num_stages - num_larger) + [share + 1] * num_larger
    assert drive.longest_wait < 2 * num_stages


def test_a_round_takes_no_more_decodes_than_its_bucket_holds():
    # The bucket is chosen for 9 sequences in two stages, 8 of which are away: then 4 prompts come in and make it 13.
    prompts = (Arrival(1, 9), *[Arrival(1, 9, step=1)] * 8, *[Arrival(1, 9, step=2)] * 4)
    drive = Drive(
        Case(
            prompts,
            num_blocks=64,
            buckets=tuple(range(1, 9)),
            max_num_seqs=13,
            num_stages=2,
            chooser=lambda demand: 4 if demand.num_decodes else 8,
        )
    ).run()
    assert [(plan.num_decodes, plan.bucket) for plan in drive.plans[:4] if plan] == [(1, 8), (8, 8), (5, 5), (5, 5)]


def test_a_pipeline_runs_as_many_as_its_micro_batches_hold():
    scheduler = scheduler_of(64, buckets=(2, 4), max_num_seqs=9, num_stages=2)
    for i in range(9):
        scheduler.add(make_sequence(i, 1, 9))
    assert [len(plan.chunks) for _ in range(4) if (plan := scheduler.schedule())] == [4, 4, 4, 4]
    assert (scheduler.num_running, scheduler.num_waiting) == (8, 1)


def test_prompts_are_shared_out_among_the_micro_batches():
    asked = []

    def chooser(demand):
        asked.append((demand.num_decodes, demand.num_prefill_tokens))
        return demand.num_decodes + demand.num_prefill_tokens

    scheduler = scheduler_of(
        64, buckets=(64, 128, 256), num_stages=2, chooser=chooser, block_size=16, max_model_len=512
    )
    scheduler.add(make_sequence(0, 300, 9))
    scheduler.add(make_sequence(1, 200, 9))
    plans = [scheduler.schedule() for _ in range(2)]
    assert asked == [(0, 250)]
    assert [[(c.seq_id, c.length) for c in plan.chunks] for plan in plans if plan] == [[(0, 250)], [(0, 50), (1, 200)]]
    scheduler.add(make_sequence(2, 70, 9))
    assert scheduler.schedule() is not None
    assert asked[1:] == [(1, 64)], "so few that one micro-batch takes nearly all of them"


def test_a_limit_below_the_decodes_runs_them_all_the_same():
    case = Case(
        tuple(Arrival(3, 9) for _ in range(8)),
        num_blocks=64,
        buckets=(2, 4, 8),
        max_num_seqs=8,
        num_stages=2,
        chooser=lambda demand: 8 if demand.num_decodes < 4 else 0,
    )
    assert max(plan.num_decodes for plan in Drive(case).run().plans if plan) == 4


def scheduler_of(num_blocks: int, **changes) -> SarathiScheduler:
    options = {"block_size": 4, "buckets": (4, 16), "max_num_seqs": 4, "window": None, "max_model_len": 64}
    return SarathiScheduler(BlockPool(num_blocks), **(options | changes))


def test_nothing_to_do():
    scheduler = scheduler_of(8)
    assert scheduler.schedule() is None
    scheduler.remove(make_sequence(7, 4, 4))
    seq = make_sequence(0, 4, 1)
    scheduler.add(seq)
    assert scheduler.schedule() is not None
    assert scheduler.schedule() is None, "its only token is in flight"
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.running) == (1, 0, (seq,))


def test_what_can_never_run_is_refused():
    scheduler = scheduler_of(8)
    scheduler.add(make_sequence(0, 30, 3))  # 32 tokens are computed, the 33rd is only drawn
    with pytest.raises(ValueError, match="needs 9 blocks of the KV cache, which has 8"):
        scheduler.add(make_sequence(1, 30, 4))
    with pytest.raises(ValueError, match="65 tokens exceed max_model_len=64"):
        scheduler.add(make_sequence(2, 60, 5))
    assert scheduler.num_waiting == 1
    windowed = scheduler_of(8, window=5)
    assert windowed.max_blocks(64) == 6  # 4 tokens before a chunk of 16, at the worst alignment
    windowed.add(make_sequence(3, 60, 4))


def test_leaking_blocks_are_an_error_not_a_hang():
    pool = BlockPool(2)
    scheduler = SarathiScheduler(
        pool, block_size=4, buckets=(4,), max_num_seqs=1, window=None, max_model_len=8, chooser=None
    )
    scheduler.add(make_sequence(0, 4, 4))
    scheduler.schedule()
    pool.allocate(1)
    with pytest.raises(BlockError, match="leaking"):
        scheduler.schedule()


def test_a_free_row_is_used_again_lowest_first():
    scheduler = scheduler_of(64)
    seqs = [make_sequence(i, 1, 9) for i in range(6)]
    for seq in seqs:
        scheduler.add(seq)
    scheduler.schedule()
    assert [seq.row for seq in seqs] == [0, 1, 2, 3, None, None]
    scheduler.remove(seqs[2])
    scheduler.remove(seqs[0])
    scheduler.schedule()
    assert [seq.row for seq in seqs] == [None, 1, None, 3, 0, 2]


@pytest.mark.parametrize(("smallest", "expected"), [(1, [[1], [1], [1]]), (4, [[3, 1], [1, 2], [1, 1]])])
def test_a_limit_below_the_decodes_holds_back_prefills_only(smallest, expected):
    scheduler = scheduler_of(64, buckets=(smallest, 16), chooser=lambda demand: 0)
    scheduler.add(make_sequence(0, min(smallest, 3), 9))
    scheduler.add(make_sequence(1, 3, 9))
    plans = [scheduler.schedule() for _ in expected]
    assert [[chunk.length for chunk in plan.chunks] for plan in plans if plan] == expected


def test_admission_reserves_what_running_prefills_still_need():
    # 10 blocks, one kept free: prompt 0 will need 6 of them, so prompt 1 (4 blocks) waits although 6 are free now.
    scheduler = scheduler_of(10)
    first, second = make_sequence(0, 24, 2), make_sequence(1, 16, 2)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert plan is not None
    assert [(chunk.seq_id, chunk.length) for chunk in plan.chunks] == [(0, 16)]
    plan = scheduler.schedule()
    assert plan is not None
    assert [(chunk.seq_id, chunk.length) for chunk in plan.chunks] == [(0, 8)]
    scheduler.remove(first)
    plan = scheduler.schedule()
    assert plan is not None
    assert [(chunk.seq_id, chunk.length) for chunk in plan.chunks] == [(1, 16)]


@pytest.mark.parametrize(("num_blocks", "num_admitted"), [(13, 3), (12, 2), (4, 1), (8, 1)])
def test_admission_takes_all_that_fit_beside_the_watermark(num_blocks, num_admitted):
    # Prompts of 4 blocks and a watermark of one block, which the first of an empty engine need not keep.
    scheduler = scheduler_of(num_blocks, buckets=(64,))
    for i in range(4):
        scheduler.add(make_sequence(i, 16, 1))
    plan = scheduler.schedule()
    assert plan is not None
    assert [chunk.seq_id for chunk in plan.chunks] == list(range(num_admitted))
