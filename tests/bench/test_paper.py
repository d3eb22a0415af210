"""The paper's experiments: files that are read or refused, pages that are the same every time."""

import dataclasses
from pathlib import Path

import pytest

from sarathi_jax.bench.paper import (
    ablation,
    chunking_overhead,
    pipeline,
    real_ablation,
    real_capacity,
    real_stall,
)
from sarathi_jax.bench.paper.experiment import Experiment, ExperimentError, Options, Section
from sarathi_jax.bench.paper.kinds import load_experiment, run, shipped_experiments
from sarathi_jax.bench.paper.loads import Claim, Loads, Point, verdict
from sarathi_jax.bench.paper.markdown import Comparison, Order, comparison_table, number, order_list
from sarathi_jax.bench.paper.parallel import in_parallel
from sarathi_jax.bench.paper.real import Engines
from sarathi_jax.bench.paper.report import write_index, write_page
from sarathi_jax.latency import Backlog
from sarathi_jax.latency.devices import Link
from sarathi_jax.resources import config_names, config_path
from sarathi_jax.scheduling.plan import Chunk, SchedulerState, StepPlan
from sarathi_jax.telemetry.definitions import MEDIAN_DELAY_SLO_S, SampleTimes
from sarathi_jax.telemetry.run import Run
from sarathi_jax.telemetry.steps import StepRecord
from sarathi_jax.timing import device_name
from sarathi_jax.workloads import poisson

QUICK = Options(quick=True)


def experiment(name: str) -> Experiment:
    return load_experiment(config_path("experiments", name))


def pages(folder: Path, name: str) -> dict[str, bytes]:
    one = experiment(name)
    write_page(one, run(one, QUICK), folder, QUICK)
    write_index(shipped_experiments(), folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_shipped_file_is_read():
    assert {one.name for one in shipped_experiments()} == set(config_names("experiments"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: intensity", "kind: intensty", r"paper.yaml: kind 'intensty' is none of"),
        ("title:", "titel:", r"paper.yaml: unknown key 'titel'; do you mean title\?"),
        ("  context: 1024", "  contexts: 1024", r"paper.yaml: settings: unknown key 'contexts'; do you mean context\?"),
        ("  context: 1024", "", r"paper.yaml: settings: context must be given"),
        ("  context: 1024", "  context: many", r"settings.context: 'many' is no int"),
        ("tp: 4", "tps: 4", r"paper.yaml: settings.deployment: engine: .*tps"),
        ("llama2-70b-8xa40", "llama", r"settings.deployment: no deployments configuration 'llama'"),
        ("device: a100-80gb", "device: a100", r"device 'a100' is none of a100-80gb"),
        ("  saturating_tokens: 512", "  tokens: 512", r"paper.yaml: paper: unknown key 'tokens'"),
        ("paper:\n", "paper: [\n", "is not valid YAML"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_files_name(tmp_path, old, new, message):
    text = config_path("experiments", "intensity").read_text()
    assert old in text
    path = tmp_path / "paper.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ExperimentError, match=message):
        load_experiment(path)


def test_same_pages_every_time(tmp_path):
    name = "intensity"
    first, second = (pages(tmp_path / folder, name) for folder in ("first", "second"))
    assert first == second
    assert {"README.md", f"{name}.md"} < set(first)
    assert {path.rpartition(".")[2] for path in first} == {"md", "csv", "svg"}
    page, index = first[f"{name}.md"].decode(), first["README.md"].decode()
    assert f"[{experiment(name).title}]({name}.md)" in index
    assert all(path in page for path in first if path not in ("README.md", f"{name}.md"))


def test_index_keeps_pages_that_were_not_made_anew(tmp_path):
    first = dataclasses.replace(experiment("intensity"), name="first", title="First")
    second = dataclasses.replace(first, name="second", title="Second")
    given = tmp_path / "given.png"
    given.write_bytes(b"picture")
    write_page(first, Section("as it was", "text"), tmp_path, Options())
    write_page(second, Section("as it is", "text", pictures={"copy": given}), tmp_path, Options())
    index = write_index([first, second], tmp_path).read_text()
    assert "| [First](first.md) | as it was |" in index
    assert "| [Second](second.md) | as it is |" in index
    assert (tmp_path / "second-copy.png").read_bytes() == b"picture"


def test_ours_beside_the_papers():
    lines = comparison_table([Comparison("P99", 0.15, 0.12, "s", "because"), Comparison("P50", 1.0)]).splitlines()
    assert lines[0] == "| what | ours | paper | ours / paper | why they differ |"
    assert lines[2:] == ["| P99 | 0.15 s | 0.12 s | 1.25 | because |", "| P50 | 1 | - | - |  |"]
    assert "why" not in comparison_table([Comparison("P50", 1.0)])
    assert [number(value) for value in (12345.6, 0.0001234, float("inf"))] == ["12,300", "0.000123", "inf"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ablation", "batch_throughput", "chunking_overhead", "hybrid_iteration", "pipeline", "tile_quantisation"]
)
def test_quick_version_of_each(tmp_path, name):
    made = pages(tmp_path, name)
    page = made[f"{name}.md"].decode()
    assert "**In one line:** " in page
    assert "quick version" in page
    assert "nan" not in page
    assert [path for path in made if path.endswith(".svg")]


def test_artifacts_cells_are_compared_where_they_are_at_hand(tmp_path):
    rows = ["prefill_length,chunk_size,prefill_execution_time"]
    rows += [f"{length},{chunk},{1000 + 512 * 100 / chunk}" for length in (2047, 4095) for chunk in (512, 1024, 16384)]
    folder = tmp_path / "osdi"
    folder.mkdir()
    (folder / "figure_9a_yi34b_tp2_chunking_overhead.csv").write_text("\n".join(rows) + "\n")
    one = experiment("chunking_overhead")
    settings = {**one.settings, "prompts": [2048, 4096], "chunks": [512, 1024]}
    one = dataclasses.replace(one, settings=settings)
    assert "Every cell, ours / measured" in chunking_overhead.run(one, Options(data=tmp_path)).text
    without = chunking_overhead.run(one, Options())
    assert "measured by" not in without.text
    assert all(1 < row["to_whole"] < 1.25 for row in without.tables["overhead"])


def test_gaps_of_the_published_harness():
    ours, theirs = poisson(2.0, 500, 3), ablation.clipped(2.0, 500, 3)
    gaps = [later - earlier for earlier, later in zip([0.0, *theirs], theirs, strict=False)]
    assert max(gaps) == pytest.approx(1.5)
    assert 0.9 * ours[-1] < theirs[-1] < ours[-1]
    assert theirs[0] == ours[0]


def test_a_ring_by_hand():
    link = pipeline.ring(Link(1e-6, 1e9), 8)
    assert link.all_reduce_s(8000, 8) == pytest.approx(14e-6 + 14e-6)


def test_answers_keep_their_order():
    assert in_parallel(abs, [-3, 1, -2], Options(), "test") == [3, 1, 2]


@pytest.mark.slow
def test_answers_keep_their_order_over_processes():
    assert in_parallel(abs, [-3, 1, -2], Options(processes=2), "test") == [3, 1, 2]


def test_a_line_of_the_engine_is_looked_at_when_its_file_is_read(tmp_path):
    text = config_path("experiments", "real_stall").read_text()
    path = tmp_path / "paper.yaml"
    for old, new, message in (
        ("token_budget: 256}", "budget: 256}", "settings.engines: sarathi: .*budget"),
        ("policy: vllm", "policy: vlm", "settings.engines: policy='vlm'"),
        ("max_model_len: 256", "max_len: 256", "settings.engines: sarathi: .*max_len"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ExperimentError, match=message):
            load_experiment(path)


def test_fields_of_a_line_in_full_and_in_quick_versions():
    engines = Engines({"ours": {"token_budget": 64}}, {"max_num_seqs": 4}, {"token_budget": 8, "token_buckets": [1, 8]})
    assert engines.of(Options()).fields("ours") == {"prefix_caching": False, "max_num_seqs": 4, "token_budget": 64}
    quick = engines.of(QUICK).fields("ours")
    assert quick == {"prefix_caching": False, "max_num_seqs": 4, "token_budget": 8, "token_buckets": (1, 8)}


def test_the_load_of_a_line_keeps_both_promises():
    late = MEDIAN_DELAY_SLO_S + 0.1
    points = [
        Point("sarathi", 1.0, 0.1, 0.0),
        Point("sarathi", 2.0, 0.2, 0.0),
        Point("sarathi", 3.0, 0.2, late),
        Point("vllm 8", 1.0, 0.15, 0.0),
        Point("vllm 16", 1.0, float("inf"), 0.0),
    ]
    loads = Loads(points, (0.1, 0.2))
    assert loads.by_line == {"sarathi": [1.0, 2.0], "vllm 8": [0.0, 1.0], "vllm 16": [0.0, 0.0]}
    strict, relaxed = loads.compare([Claim("sarathi", "vllm", 0.1, 3.0), Claim("sarathi", "vllm", 0.2, 4.0)])
    assert (strict.ours, strict.paper) == (float("inf"), 3.0)
    assert (relaxed.ours, relaxed.paper) == (2.0, 4.0)
    assert verdict(relaxed) == "sarathi to the best vllm at 0.2 s: 2.00 times the load (paper: 4)"
    assert "| 0.2 | 2 | 1 | 0 |" in loads.text([relaxed])


def test_orders_are_of_those_that_both_have():
    order = Order.of("P99", {"a": 2.0, "b": 1.0, "c": 0.0}, {"a": 1.0, "b": 3.0})
    assert (order.ours, order.paper, order.is_papers) == (("b", "a"), ("a", "b"), False)
    assert order_list([order]) == "- P99, best first: b, a; in the paper a, b."


def test_ideas_are_drawn_relative_to_both():
    cells = {"hybrid_only": (0.2, 0.6), "sarathi": (0.4, 0.1)}
    assert real_ablation.relative(cells, "sarathi") == {
        "P50 TTFT": {"hybrid_only": pytest.approx(0.5), "sarathi": 1.0},
        "P99 TBT": {"hybrid_only": pytest.approx(6.0), "sarathi": 1.0},
    }


def test_waits_of_a_run_that_was_cut_off_count():
    stalled = SampleTimes("0", 0.0, (1.0, 1.1, 3.1), first_scheduled_s=0.0, finished_s=3.1)
    waiting = SampleTimes("1", 0.0, (1.0, 1.2), first_scheduled_s=0.0)
    (row,) = real_stall.waits({"vllm": Run((stalled, waiting), 6.2)})
    assert row["line"] == "vllm"
    assert row["longest_wait_s"] == pytest.approx(5.0)
    assert row["p99_tbt_s"] == float("inf")
    assert row["longest_stall_s"] == 0.0, "nothing is known of steps"


def test_stalls_are_what_prompts_take_of_a_wait():
    sample = SampleTimes("0", 0.0, (1.0, 1.1, 3.1), first_scheduled_s=0.0, finished_s=3.1)
    decode, prompt = StepPlan((Chunk(0, 9, 1, True),), 8, 1), StepPlan((Chunk(1, 0, 60, True),), 64, 0)
    state, spans = SchedulerState(1, 0, 9, 9, Backlog()), ((decode, 1.0, 1.1), (prompt, 1.1, 1.6), (decode, 1.6, 3.1))
    steps = [StepRecord(plan, ("0",), at_s, at_s, at_s, end_s, 1, (), (), state) for plan, at_s, end_s in spans]
    assert real_stall.longest_stalls(Run((sample,), 3.1, (tuple(steps),))) == {"0": pytest.approx(0.5)}


def test_each_engine_is_opened_once():
    policies: dict = {"sarathi": {"strict": "small", "relaxed": "large"}, "vllm": {"strict": "vllm", "relaxed": "vllm"}}
    assert real_capacity.cells_by_line(policies, "vllm") == {
        "vllm": [("vllm", "strict"), ("vllm", "relaxed")],
        "small": [("sarathi", "strict")],
        "large": [("sarathi", "relaxed")],
    }
    assert [real_capacity.ratio(*of) for of in ((3.0, 2.0), (3.0, 0.0))] == [1.5, float("inf")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["real_ablation", "real_capacity", "real_stall", "real_tradeoff"])
def test_quick_version_on_the_engine_itself(tmp_path, name):
    made = pages(tmp_path, name)
    page = made[f"{name}.md"].decode()
    assert "Measured in real time" in page
    assert device_name() in page
    assert "quick version" in page
    assert [path for path in made if path.endswith(".svg")]
    assert [path for path in made if path.endswith(".csv")]
