"""Timelines: one answer that stalls and the steps that made it wait (Figure 1a of the paper), what steps held."""

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarathi_jax.telemetry.definitions import SampleTimes
from sarathi_jax.telemetry.plots.style import PlotError, line_styles, picture, seconds_text
from sarathi_jax.telemetry.run import Run
from sarathi_jax.telemetry.steps import StepRecord

_KIND_COLOURS = {"decode": "#9ecae1", "mixed": "#74c476", "prefill": "#fd8d3c"}
_MOST_STALLS = 3
_TIMES_MEDIAN = 4  # a gap so many times the median one is a stall
_MOST_STEPS = 500


def generation_stall(
    runs: Mapping[str, Run], path: Path, *, request_id: str | None = None, title: str | None = None
) -> None:
    """Tokens of one request as they came under each policy, and below them each policy's steps by kind.

    Its longest waits are shaded and labelled with their length. Seconds count from the request's first token.

    Args:
      runs: of the same workload, by policy.
      path: of the picture.
      request_id: whose answer; None: the one that stalled longest in any run.
      title: None: says what is drawn.

    Raises:
      PlotError: no run has a request with two tokens, or see `picture`.
    """
    chosen = request_id if request_id is not None else _longest_stalled(runs)
    samples = {name: _sample(run, chosen) for name, run in runs.items()}
    shown = {name: sample for name, sample in samples.items() if sample is not None}
    if not shown:
        raise PlotError(f"{path}: no request got two tokens, so none can have stalled")
    length_s = max(sample.token_s[-1] - sample.token_s[0] for sample in shown.values())
    striped = [name for name in shown if any(runs[name].steps)]
    heights = [3.6, *[0.32] * len(striped)]
    with picture(
        path,
        (9.5, 0.9 + sum(heights) + 0.15 * len(striped)),
        nrows=len(heights),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
    ) as grid:
        curve, *strips = grid[:, 0]
        for name, style in line_styles(shown).items():
            _draw_answer(curve, name, shown[name], style)
        most = max(len(sample.token_s) for sample in shown.values())
        curve.set(ylabel="tokens received", xlim=(-0.02 * length_s, 1.02 * length_s), ylim=(0, 1.12 * most))
        curve.legend(loc="lower right")
        curve.set_title(title or f"One answer, token by token (request {chosen}), and its longest waits")
        for axes, name in zip(strips, striped, strict=True):
            _draw_strip(axes, name, runs[name], shown[name].token_s[0], length_s)
        if strips:
            strips[0].legend(*_kind_legend(strips[0]), loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8)
        grid[-1, 0].set_xlabel("seconds since the answer's first token")


def batch_composition(run: Run, path: Path, *, replica: int = 0, title: str | None = None) -> None:
    """Tokens of decodes, prompts and padding in each step over time, and how many requests run and wait.

    Args:
      run: whose steps are known.
      path: of the picture.
      replica: whose steps.
      title: None: says what is drawn.

    Raises:
      PlotError: no steps, or see `picture`.
    """
    steps = run.steps[replica] if replica < len(run.steps) else ()
    if not steps:
        raise PlotError(f"{path}: the steps of this run are not known")
    spans, groups = _groups(steps)
    decodes = np.array([statistics.fmean(step.plan.num_decodes for step in group) for group in groups])
    tokens = np.array([statistics.fmean(step.plan.num_tokens for step in group) for group in groups])
    buckets = np.array([statistics.fmean(step.plan.bucket for step in group) for group in groups])
    with picture(path, (9.5, 5), nrows=2, sharex=True, height_ratios=(3, 1)) as (held, queue):
        layers = (
            ("decodes", np.zeros_like(decodes), decodes, _KIND_COLOURS["decode"]),
            ("prompts", decodes, tokens, _KIND_COLOURS["prefill"]),
            ("padding", tokens, buckets, "#dddddd"),
        )
        for name, low, high, colour in layers:
            held.fill_between(_corners(spans), *_levels(low, high), color=colour, lw=0, label=name)
        held.set(ylabel="tokens a step", ylim=(0, None))
        held.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
        held.set_title(title or "What each step held" + (", on average" if len(steps) > len(groups) else ""))
        ends = [group[-1].ended_s for group in groups]
        for name, colour, counts in (
            ("running", "#0072b2", [group[-1].state.num_running for group in groups]),
            ("waiting", "#d55e00", [group[-1].state.num_waiting for group in groups]),
        ):
            queue.step(ends, counts, where="post", color=colour, lw=1.4, label=name)
        queue.set(xlabel="seconds", ylabel="requests", ylim=(0, None))
        queue.legend(loc="lower right", bbox_to_anchor=(1, 0.95), ncols=2)


def longest_gap_s(sample: SampleTimes) -> float:
    """The longest wait between two tokens; 0 where there are not two."""
    return max(sample.tbts_s, default=0.0)


def _longest_stalled(runs: Mapping[str, Run]) -> str:
    samples = (sample for run in runs.values() for sample in run.samples)
    worst = max(samples, key=longest_gap_s, default=None)
    return "" if worst is None else worst.request_id


def _sample(run: Run, request_id: str) -> SampleTimes | None:
    ids = (sample for sample in run.samples if sample.request_id == request_id and len(sample.token_s) > 1)
    return next(ids, None)


def _draw_answer(axes: Any, name: str, sample: SampleTimes, style: Mapping[str, Any]) -> None:
    seconds = [at_s - sample.token_s[0] for at_s in sample.token_s]
    gaps = sample.tbts_s
    axes.step(
        seconds,
        range(1, len(seconds) + 1),
        where="post",
        lw=2,
        label=f"{name}: longest wait {seconds_text(max(gaps))}",
        **style,
    )
    limit = _TIMES_MEDIAN * statistics.median(gaps)
    longest = sorted(range(len(gaps)), key=gaps.__getitem__)[-_MOST_STALLS:]
    for i in longest:
        if gaps[i] > limit:
            axes.fill_between(seconds[i : i + 2], 0, i + 1, color=style["color"], alpha=0.13, lw=0)
            middle = (seconds[i] + seconds[i + 1]) / 2
            axes.annotate(
                seconds_text(gaps[i]),
                (middle, i + 1),
                (0, 4),
                textcoords="offset points",
                ha="center",
                color=style["color"],
                size=9,
            )


def _draw_strip(axes: Any, name: str, run: Run, begin_s: float, length_s: float) -> None:
    """The steps of the first replica while the answer came; white where the device had none."""
    steps = [step for step in run.steps[0] if begin_s <= step.ended_s and step.started_s <= begin_s + 1.02 * length_s]
    spans = _joined(steps)
    for kind, colour in _KIND_COLOURS.items():
        bars = [(start_s - begin_s, end_s - start_s) for its, start_s, end_s in spans if its == kind]
        axes.broken_barh(bars, (0, 1), color=colour, lw=0, label=kind)
    axes.set(ylim=(0, 1), yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
    axes.spines["left"].set_visible(False)


def _joined(steps: Sequence[StepRecord]) -> list[tuple[str, float, float]]:
    """(kind, begin, end) of steps of one kind without time between them, so that thousands of decodes are one bar."""
    spans: list[tuple[str, float, float]] = []
    for step in steps:
        kind, began_s = _kind(step), step.started_s
        if spans and spans[-1][0] == kind and began_s - spans[-1][2] < 1e-3:
            began_s = spans.pop()[1]
        spans.append((kind, began_s, step.ended_s))
    return spans


def _kind(step: StepRecord) -> str:
    plan = step.plan
    if not plan.num_decodes:
        return "prefill"
    return "mixed" if plan.num_tokens > plan.num_decodes else "decode"


def _kind_legend(axes: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles, [f"{label} step" for label in labels]


def _groups(steps: Sequence[StepRecord]) -> tuple[np.ndarray, list[list[StepRecord]]]:
    """Steps and when each began and ended; of very many those that began in equal spans of time together."""
    if len(steps) <= _MOST_STEPS:
        return np.array([(step.started_s, step.ended_s) for step in steps]), [[step] for step in steps]
    begin_s, width_s = steps[0].started_s, (steps[-1].ended_s - steps[0].started_s) / _MOST_STEPS
    bins = collections.defaultdict[int, list[StepRecord]](list)
    for step in steps:
        bins[int((step.started_s - begin_s) / width_s)].append(step)
    # A step may be longer than a span.
    spans = [(begin_s + i * width_s, max(begin_s + (i + 1) * width_s, its[-1].ended_s)) for i, its in bins.items()]
    starts_s = [start_s for start_s, _ in spans[1:]] + [math.inf]
    cut = [(start_s, min(end_s, next_s)) for (start_s, end_s), next_s in zip(spans, starts_s, strict=True)]
    return np.array(cut), list(bins.values())


def _corners(spans: np.ndarray) -> np.ndarray:
    """Seconds of an outline that goes up at the start of each span and down at its end."""
    return np.repeat(spans.reshape(-1), 2)


def _levels(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both edges of such an outline."""
    low, high = (np.stack([0 * edge, edge, edge, 0 * edge], axis=1).reshape(-1) for edge in (low, high))
    return low, high
