"""What a mesh exchanges, and how long the stages of a pipeline wait for each other.

The pipelines are timed, which no other test is: their stages sleep, so that the time of a step is set, and what engine
and runner add to it must be small beside it even on a busy machine.
"""

import collections
import math

import jax
import numpy as np
import pytest

from sarathi_jax.bench.bubbles import Load, SlowPipeline, StageTime, Timeline, bubbles_table
from sarathi_jax.bench.mesh_report import Collective, read_collectives, report_stages
from sarathi_jax.bench.slow_stage import Span
from sarathi_jax.bench.timeline import draw_timelines
from sarathi_jax.config import CacheConfig, EngineConfig
from sarathi_jax.models import ModelFunction
from sarathi_jax.parallel import make_meshes
from sarathi_jax.scheduling.plan import Chunk, StepPlan
from sarathi_jax.weights.directory import load_model_config
from tests.tiny_models import write_tiny_model

STAGE_TIME = StageTime(0.06, 0.0006)
LONG = pytest.mark.parallel


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_stages", [2, 4])
def test_bubbles(num_stages: int):
    pipeline, load = SlowPipeline(num_stages, STAGE_TIME), Load.draw(96)
    whole = pipeline.run("vllm", load)
    # A machine that stands still for half a second in one run hardly does so in all.
    for _ in range(4):
        ours = pipeline.run("sarathi", load)
        print(bubbles_table([ours, whole]))
        longest_wait = max(map(ours.bubble_share, range(num_stages)))
        if ours.ideal_share() >= 0.95 and longest_wait < 0.06:
            break
    assert ours.ideal_share() >= 0.95
    assert longest_wait < 0.06
    assert ours.num_steady > len(ours.plans) / 2
    # Stage 0 of a step runs while stage 1 runs the step before.
    assert ours.overlap_share > 0.9
    assert whole.ideal_share() < ours.ideal_share() - 0.05
    assert min(map(whole.bubble_share, range(num_stages))) > 0.1
    assert whole.seconds > ours.seconds
    # Sleeping takes nothing away: each request got all its tokens, and each stage ran each micro-batch once.
    for timeline in (ours, whole):
        assert sum(plan.num_tokens for plan in timeline.plans) == sum(p + n - 1 for p, n in load.requests)
        assert collections.Counter(span.stage for span in timeline.spans) == dict.fromkeys(
            range(num_stages), len(timeline.plans)
        )


def test_shares_of_a_timeline():
    """Two stages, three micro-batches of which the second is late by half a step in stage 1."""
    time_of = StageTime(1.0, 0.0)
    plans = tuple(StepPlan((Chunk(0, i, 1, True),), 2, 1) for i in range(3))
    begins = {0: (0.0, 1.0, 2.5), 1: (1.0, 2.5, 3.5)}
    spans = tuple(Span(stage, i, at, at + 1) for stage, times in begins.items() for i, at in enumerate(times))
    timeline = Timeline("sarathi", plans, 3, spans, time_of)
    assert timeline.ideal_share() == pytest.approx(4 / 4.5)
    assert [timeline.bubble_share(stage) for stage in (0, 1)] == pytest.approx([0.5 / 3.5] * 2)
    assert timeline.padding == 0.5
    assert timeline.overlap_share == 1
    assert "| 0.889 |" in bubbles_table([timeline])
    assert draw_timelines([timeline], 0, 5).count("<rect") == 1 + 2 + 2 * 6 + 3


def test_reads_collectives():
    text = """
  %a = f32[8,64]{1,0} all-reduce(%x), channel_id=1, metadata={op_name="jit(step)/psum"}
  %b = (f32[8,16]{1,0}, f32[8,64]{1,0}) all-gather-start(%y), metadata={op_name="jit(step)/gather_hidden/all_gather"}
  %c = f32[8,64]{1,0} all-gather-done(%b), metadata={op_name="jit(step)/gather_hidden/all_gather"}
  %d = (f32[2]{0}, s32[2]{0}) all-reduce(%p, %q), channel_id=2
  %e = f32[8,64]{1,0} all-reduce(%z), channel_id=3
  %f = f32[8,64]{1,0} fusion(%a, %e)
"""
    assert read_collectives(text) == (
        Collective("all-gather", "hidden rows", "f32[8,64]", 2048, 1),
        Collective("all-reduce", "", "f32[2], s32[2]", 16, 1),
        Collective("all-reduce", "", "f32[8,64]", 2048, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("short", [True, pytest.param(False, marks=LONG)])
def test_mesh_report(tmp_path, short: bool):
    """What tests/parallel finds in the programs that run, here from shapes, of all layers or concluded from a few."""
    write_tiny_model("falcon-40b", tmp_path, changes={"num_hidden_layers": 10, "tie_word_embeddings": False})
    model = load_model_config(tmp_path)
    engine = EngineConfig(dtype="float32", token_buckets=(16,), max_num_seqs=8, tp=2, pp=2, block_size=8)
    cache = CacheConfig(64, 8, 160)
    reports = report_stages(model, engine, cache, make_meshes(model, engine, jax.devices()), bucket=16, short=short)
    counts = [{(one.kind, one.purpose): one.count for one in report.collectives} for report in reports]
    assert counts[0] == {("all-reduce", ""): 5 + 1}
    assert counts[1][("all-reduce", "")] == 5
    assert counts[1][("all-gather", "hidden rows")] == 1
    assert {kind for kind, _ in counts[1]} == {"all-reduce", "all-gather"}
    sums = next(one for one in reports[0].collectives if one.kind == "all-reduce")
    assert sums.size == 4 * 16 * model.hidden_size
    # Together the stages hold the model once; all but the norms are split over the devices of a stage.
    shapes = ModelFunction(model, np.dtype("float32")).shapes
    sizes = {name: 4 * math.prod(leaf.shape) for name, leaf in shapes.items()}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    assert sum(report.weight_bytes for report in reports) == (sum(sizes.values()) + norms) / 2
    assert all(report.token_bytes == 2 * 4 * 5 * model.num_kv_heads * model.head_dim / 2 for report in reports)
    assert [report.sent_bytes for report in reports] == [4 * 16 * model.hidden_size / 2, 4 * 2 * 8]
    assert all(report.scratch_bytes > 0 for report in reports)
