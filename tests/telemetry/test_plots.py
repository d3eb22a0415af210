"""Pictures of made-up runs: they hold the names, and are the same files twice."""

import builtins
import html
import math
import random

import pytest

from sarathi_jax.latency import Backlog, LatencyTable, Timing
from sarathi_jax.scheduling.plan import Chunk, SchedulerState, StepPlan
from sarathi_jax.telemetry.definitions import Observations, SampleTimes
from sarathi_jax.telemetry.plots import (
    Choice,
    PlotError,
    bars,
    batch_composition,
    generation_stall,
    latency_curves,
    pareto,
    quantiles,
    throughput_latency,
)
from sarathi_jax.telemetry.plots.comparisons import front_of
from sarathi_jax.telemetry.plots.curves import crossing
from sarathi_jax.telemetry.plots.timelines import _groups
from sarathi_jax.telemetry.run import Run
from sarathi_jax.telemetry.steps import StepRecord


def step(at_s: float, length_s: float, decodes: int, prefill: int, bucket: int) -> StepRecord:
    chunks = [Chunk(i, 9, 1, True) for i in range(decodes)] + ([Chunk(99, 0, prefill, True)] if prefill else [])
    plan = StepPlan(tuple(chunks), bucket, decodes)
    times = (at_s, at_s, at_s, at_s + length_s)
    state = SchedulerState(decodes, 2, 100, 50, Backlog())
    return StepRecord(plan, ("a",) * len(chunks), *times, decodes, (), (), state)


def run(stall_s: float) -> Run:
    """One answer of 40 tokens, 50 ms each, that waits once in the middle for a prompt."""
    steps, at_s, token_s = [], 0.0, []
    for i in range(40):
        stalls = stall_s if i == 20 else 0.0
        if stalls:
            steps.append(step(at_s, stalls, 0, 512, 512))
            at_s += stalls
        steps.append(step(at_s, 0.05, 1, 30 if i % 3 else 0, 64))
        at_s += 0.05
        token_s.append(at_s)
    return Run((SampleTimes("answer", 0.0, tuple(token_s), 0.0, at_s),), at_s, (tuple(steps),))


RUNS = {"sarathi": run(0.1), "vllm": run(1.75)}
CURVES = {
    "sarathi": [(0.5, 0.05), (1.0, 0.08), (1.5, 0.3)],
    "sarathi, 512": [(0.5, 0.06), (1.0, 0.09)],
    "vllm": [(0.5, 0.08), (1.0, 0.9), (1.5, math.inf)],
}
DRAWS = random.Random(0)
OBSERVED = {
    name: Observations(tuple(DRAWS.lognormvariate(-3, scale) for _ in range(3000)), (1.0,))
    for name, scale in (("sarathi", 0.2), ("vllm", 1.0))
}
TABLE = LatencyTable(
    [Timing(b, d, k * d, k * (1 - d), b * k / 1e4) for b in (16, 64) for d in (0, 1) for k in (16, 99)]
)
CHOICES = [Choice("two of a40", 2, 1.0), Choice("one of a100", 4, 3.0, "chosen"), Choice("no memory", 1, 0, "rejected")]

PICTURES = {
    "quantiles": (lambda path: quantiles(OBSERVED, path, slo_s=0.1), ("sarathi: P99", "vllm: P99", "SLO 100 ms")),
    "throughput": (lambda path: throughput_latency(CURVES, {"strict": 0.1}, path), ("sarathi, 512", "strict: 100 ms")),
    "stall": (lambda path: generation_stall(RUNS, path), ("vllm: longest wait 1.8 s", "1.8 s", "mixed step")),
    "batch": (lambda path: batch_composition(RUNS["vllm"], path), ("decodes", "prompts", "padding", "waiting")),
    "bars": (lambda path: bars({"yi": 3.7}, {"yi": 4.3}, path), ("yi", "(0.86 of the paper's)", "4.3")),
    "pareto": (lambda path: pareto(CHOICES, path), ("two of a40", "chosen", "rejected", "no memory")),
    "table": (lambda path: latency_curves(TABLE, path), ("16 tokens", "64 tokens")),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_holds_the_names(name, tmp_path):
    draw, words = PICTURES[name]
    draw(tmp_path / "new folder" / "picture.svg")
    text = html.unescape((tmp_path / "new folder" / "picture.svg").read_text())
    for word in words:
        assert word in text, word
    assert len(text) < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_same_twice(name, tmp_path):
    draw, _ = PICTURES[name]
    draw(tmp_path / "one.svg")
    draw(tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_picture_may_be_a_png(tmp_path):
    bars({"a": 1.0}, {}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    with pytest.raises(PlotError, match=r"\.svg or \.png"):
        bars({"a": 1.0}, {}, tmp_path / "bars.gif")
    nothing = Run((), 1.0)
    for draw in (
        lambda path: quantiles({"a": Observations(())}, path),
        lambda path: throughput_latency({"a": [(1, math.inf)]}, {}, path),
        lambda path: generation_stall({"a": nothing}, path),
        lambda path: batch_composition(nothing, path),
        lambda path: bars({}, {}, path),
        lambda path: pareto([], path),
    ):
        with pytest.raises(PlotError):
            draw(tmp_path / "none.svg")
    real = builtins.__import__

    def without_matplotlib(name, *more, **others):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *more, **others)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(PlotError, match=r"pip install 'sarathi-jax\[plots\]'"):
        bars({"a": 1.0}, {}, tmp_path / "bars.svg")


def test_very_many_steps_are_drawn_by_spans_of_time():
    """A step before and after a long pause: nothing is drawn in between."""
    steps = [step(i * 0.01 + (50 if i > 1000 else 0), 0.01, 1, 0, 8) for i in range(2000)]
    spans, groups = _groups(steps)
    assert sum(map(len, groups)) == 2000
    assert len(groups) <= 501
    assert (spans[:-1, 1] <= spans[1:, 0] + 1e-9).all()
    assert spans[-1, 1] - spans[0, 0] - (spans[:, 1] - spans[:, 0]).sum() > 49


def test_a_promise_ends_between_two_points_of_a_curve():
    assert crossing([(1, 0.01), (2, 1.0)], 0.1) == pytest.approx(1.5)
    assert crossing([(1, 0.01), (2, math.inf)], 0.1) == 1
    assert crossing([(1, 0.2), (2, 1.0)], 0.1) is None
    assert crossing([(1, 0.02), (2, 0.05)], 0.1) is None


def test_the_front_holds_what_nothing_beats():
    points = [Choice("a", 1, 1), Choice("b", 2, 1), Choice("c", 2, 3), Choice("d", 4, 2), Choice("e", 5, 4)]
    assert [point.label for point in front_of(points)] == ["a", "c", "e"]
    assert [point.label for point in front_of(points, higher_is_better=False)] == ["a"]
