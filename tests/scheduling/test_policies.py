"""Every policy on the same four requests, drawn as timelines, and what sets one apart from the others."""

import itertools
import re
from pathlib import Path

import pytest

from sarathi_jax.config import CHUNKING, POLICIES, CacheConfig, ConfigError, EngineConfig, ModelConfig, RopeConfig
from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.latency import LatencyTable, StepTimes, Timing
from sarathi_jax.request import Request, SamplingParams
from sarathi_jax.scheduling.fastserve import FastServeScheduler
from sarathi_jax.scheduling.make import make_scheduler
from sarathi_jax.scheduling.plan import ChunkSchedule
from sarathi_jax.sequence import Sequence
from tests.scheduling.drive import Arrival, Case, Drive, drawn, make_sequence, timeline

DOCS = Path(__file__).resolve().parents[2] / "docs"

# Three rows, 12 blocks of 4 tokens; steps of 8 tokens where prompts are cut, of 32 where they are not. The longest
# sequence has 24 tokens, 6 blocks.
REQUESTS = (Arrival(6, 9), Arrival(20, 4, step=2), Arrival(5, 3, step=3), Arrival(3, 3, step=4))
TIMELINES = {
    "sarathi": """
        bucket   8  4  8  8  8  8  4  4  4  4  4
        seq 0    6  d  d  d  d  d  d  d  d  .  .
        seq 1    .  .  7  7  6  d  d  d  .  .  .
        seq 2    .  .  .  .  1  4  d  d  .  .  .
        seq 3    .  .  .  .  .  .  .  .  3  d  d
    """,
    "chunked_only": """
        bucket   8  4  8  4  8  4  8  4  4  4  4  4  4  4
        seq 0    6  d  .  d  .  d  .  d  .  d  d  .  d  d
        seq 1    .  .  8  .  8  .  4  d  .  d  d  .  .  .
        seq 2    .  .  .  .  .  .  4  .  1  d  d  .  .  .
        seq 3    .  .  .  .  .  .  .  .  .  .  .  3  d  d
    """,
    "hybrid_only": """
        bucket   8  4 32  8  4  4  4  4  4
        seq 0    6  d  d  d  d  d  d  d  d
        seq 1    .  . 20  d  d  d  .  .  .
        seq 2    .  .  .  5  d  d  .  .  .
        seq 3    .  .  .  .  .  .  3  d  d
    """,
    "orca": """
        bucket   8  4 32  4  4  4  8  4  4  4  4  4
        seq 0    6  d  d  d  d  d  d  d  d  .  .  .
        seq 1    .  . 20  d  d  d  .  .  .  .  .  .
        seq 2    .  .  .  .  .  .  5  d  d  .  .  .
        seq 3    .  .  .  .  .  .  .  .  .  3  d  d
    """,
    "vllm": """
        bucket   8  4 32  8  4  4  4  4  4  4  4  4
        seq 0    6  d  .  .  d  d  .  d  d  d  d  d
        seq 1    .  . 20  .  d  d  .  d  .  .  .  .
        seq 2    .  .  .  5  d  d  .  .  .  .  .  .
        seq 3    .  .  .  .  .  .  3  d  d  .  .  .
    """,
    "faster_transformer": """
        bucket   8  4  4  4  4  4  4  4  4 32  4  4  4  4  4  4
        seq 0    6  d  d  d  d  d  d  d  d  .  .  .  .  .  .  .
        seq 1    .  .  .  .  .  .  .  .  . 20  d  d  d  .  .  .
        seq 2    .  .  .  .  .  .  .  .  .  5  d  d  .  .  .  .
        seq 3    .  .  .  .  .  .  .  .  .  .  .  .  .  3  d  d
    """,
    "fastserve": """
        bucket   8  4 32  8  8  4 32  4  4
        seq 0    6  d  d  d  d  d  d  d  d
        seq 1    .  . 20  d  x  . 22  d  .
        seq 2    .  .  .  5  d  d  .  .  .
        seq 3    .  .  .  .  3  d  d  .  .
    """,
}


def case_of(policy, *arrivals: Arrival, **changes) -> Case:
    buckets = (4, 8) if policy in CHUNKING else (4, 8, 16, 32)
    settings = {"num_blocks": 12, "max_num_seqs": 3, "buckets": buckets, "policy": policy}
    return Case(arrivals, **settings | changes)


def test_every_policy_is_drawn():
    assert set(TIMELINES) == set(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_requests(policy):
    assert timeline(case_of(policy, *REQUESTS)) == drawn(TIMELINES[policy])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_documentation_shows_it(policy):
    assert drawn(TIMELINES[policy]) in drawn((DOCS / "policies.md").read_text())


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_made_from_its_name(policy):
    model = ModelConfig("decoder", 64, 32, 64, 1, 2, 2, 16, 64, 1e-5, RopeConfig(), (None,))
    engine = EngineConfig(policy=policy, token_budget=16, max_num_seqs=2, block_size=4)
    scheduler = make_scheduler(model, engine, CacheConfig(num_blocks=40, block_size=4, max_model_len=64))
    assert scheduler.longest_prompt == (63 if policy in CHUNKING else 16)
    assert not scheduler.keeps_pace
    scheduler.add(make_sequence(0, 16, 4))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens == 16
    if policy not in CHUNKING:
        with pytest.raises(ValueError, match="17 tokens exceeds the largest step of 16.*token_budget to 17.*sarathi"):
            scheduler.add(make_sequence(1, 17, 4))


@pytest.mark.parametrize("policy", sorted({*POLICIES} - {*CHUNKING}))
@pytest.mark.parametrize("setting", [{"tbt_slo_ms": 50}, {"chunk_schedule": (512, 128, 4, 4096)}], ids=str)
def test_what_only_chunks_can_do_is_refused(policy, setting):
    with pytest.raises(ConfigError, match="only the policies sarathi and chunked_only can .*leave one of them out"):
        EngineConfig(policy=policy, **setting)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((512, 128), "four positive integers: HIGH, LOW, STAGES, TOKENS"),
        ((512, 128, 0, 4096), "four positive integers"),
        ((128, 512, 4, 4096), "HIGH=128 must lie between LOW and the largest step of 512"),
        ((1024, 128, 4, 4096), "HIGH=1024 must lie"),
        ((512, 32, 4, 4096), "LOW=32 must exceed the 32 decodes of a step"),
    ],
)
def test_chunk_schedules_that_make_no_sense(schedule, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig(chunk_schedule=schedule, num_blocks=64)


def test_chunks_shrink_in_stages():
    schedule = ChunkSchedule(high=8, low=4, num_stages=3, num_tokens=24)
    assert [schedule(start) for start in (0, 7, 8, 15, 16, 24, 99)] == [8, 8, 6, 6, 4, 4, 4]
    assert ChunkSchedule(8, 4, 1, 24)(99) == 8
    # The decode counts, and prompt 2, whose first chunk may fill a larger step, gets what prompt 1 may not take.
    arrivals = Arrival(4, 8), Arrival(24, 2, step=1), Arrival(9, 2, step=3)
    case = case_of("sarathi", *arrivals, chunk_schedule=schedule, num_blocks=64)
    assert timeline(case) == drawn("""
        bucket   4  8  8  8  8  8  4  4
        seq 0    4  d  d  d  d  d  d  d
        seq 1    .  7  7  5  3  2  d  .
        seq 2    .  .  .  2  4  3  d  .
    """)


def test_orca_reserves_the_longest_sequence():
    arrivals = (Arrival(2, 2), Arrival(2, 2), Arrival(30, 2, step=9))
    assert Drive(case_of("orca", *arrivals, num_blocks=8)).run().scheduler.state.backlog.num_free_rows == 1
    assert Drive(case_of("orca", *arrivals, num_blocks=16)).run().scheduler.state.backlog.num_free_rows == 2


def test_a_batch_of_many_prompts_takes_several_steps():
    case = case_of("faster_transformer", *[Arrival(12, 2)] * 3, Arrival(2, 2, step=1), num_blocks=16, buckets=(4, 24))
    assert timeline(case) == drawn("""
        bucket  24 24  4  4  4
        seq 0   12  .  d  .  .
        seq 1   12  .  d  .  .
        seq 2    . 12  d  .  .
        seq 3    .  .  .  2  d
    """)


def served_in(drive: Drive, seq_id: int) -> list[int]:
    """Steps in which a sequence got a token."""
    chunks = [(step, chunk) for step, plan in enumerate(drive.plans) if plan for chunk in plan.chunks]
    return [step for step, chunk in chunks if chunk.seq_id == seq_id and chunk.samples]


@pytest.mark.parametrize(("patience", "longest"), [(10_000, 60), (8, 12)])
def test_nobody_starves(patience, longest):
    """A long request in a stream of short ones that would keep the only row busy for ever."""
    short = [Arrival(1, 2, step=2 * i) for i in range(1, 40)]
    case = case_of("fastserve", Arrival(16, 9), *short, max_num_seqs=1)
    drive = Drive(case)
    drive.scheduler = FastServeScheduler(drive.pool, patience=patience, **case.sizes)
    steps = served_in(drive.run(), 0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    assert longest // 2 < max(gaps) <= (longest if patience < 100 else 100)


def test_priority_goes_before_levels():
    case = case_of("fastserve", Arrival(2, 6), Arrival(2, 2), max_num_seqs=1)
    scheduler = case.scheduler(BlockPool(case.num_blocks))
    for seq_id, priority in ((0, 1), (1, 2)):
        request = Request(str(seq_id), (1, 2), SamplingParams(), 6, 0, frozenset(), 0.0, priority=priority)
        scheduler.add(Sequence(seq_id, request))
    plans = [scheduler.schedule() for _ in range(6)]
    assert [[chunk.seq_id for chunk in plan.chunks] for plan in plans if plan] == [[0]] * 6


def test_work_is_time_where_times_are_known():
    """A step takes 1 ms for each token of its bucket: the unit is a step of 4, so a prompt of 9 is 4 units, not 9."""
    timings = [Timing(b, num, keys, 0, b * 1e-3) for b in (4, 8, 16, 32) for num, keys in ((b, 0), (b, 999), (0, 0))]
    times = StepTimes(LatencyTable([*timings, *[Timing(b, 0, 0, 9999, b * 1e-3) for b in (4, 8, 16, 32)]]))
    case = case_of("fastserve", Arrival(9, 4))
    levels = []
    for given in (None, times):
        scheduler = FastServeScheduler(BlockPool(12), times=given, **case.sizes)
        scheduler.add(make_sequence(0, 9, 4))
        levels.append(scheduler._places[0].level)
    assert levels == [4, 2]
