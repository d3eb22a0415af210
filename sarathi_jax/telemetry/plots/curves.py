"""Curves: how many waited longer, latency over load, step times over the cache's fill."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sarathi_jax.latency import LatencyTable
from sarathi_jax.telemetry.definitions import Observations, survival
from sarathi_jax.telemetry.plots.style import (
    NOTE_COLOUR,
    SLO_COLOUR,
    PlotError,
    line_styles,
    picture,
    plain_ticks,
    seconds_text,
)

_MOST_POINTS = 400


def quantiles(
    named_values: Mapping[str, Observations],
    path: Path,
    *,
    what: str = "time between tokens",
    slo_s: float | None = None,
    title: str | None = None,
) -> None:
    """The tail of one metric: how many of the values are longer than a time, both on logarithmic axes.

    Args:
      named_values: observations by policy, or by whatever is compared.
      path: of the picture.
      what: the metric's name.
      slo_s: what is promised, drawn as a line.
      title: None: of the metric.

    Raises:
      PlotError: no values at all, or see `picture`.
    """
    drawn = {name: its for name, its in named_values.items() if its.values}
    if not drawn:
        raise PlotError(f"{path}: there is no {what} to draw")
    with picture(path, (7.5, 4.6)) as axes:
        for name, style in line_styles(drawn).items():
            seconds, shares = _tail(drawn[name])
            p99_s = drawn[name].quantile(0.99)
            text = seconds_text(p99_s) if math.isfinite(p99_s) else "not reached"
            axes.step(1e3 * seconds, 100 * shares, where="post", lw=2, label=f"{name}: P99 {text}", **style)
        axes.set(xscale="log", yscale="log", xlabel=f"{what} [ms]", ylabel="share that took longer [%]")
        lowest = 100 * min(1 / len(its.values) for its in drawn.values())
        axes.set_ylim(max(1e-3, min(lowest, 0.5)), 120)
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
        for share, name in ((50, "P50"), (10, "P90"), (1, "P99")):
            axes.axhline(share, color=NOTE_COLOUR, ls=":", lw=0.8)
            axes.text(1, share, f" {name}", color=NOTE_COLOUR, va="center", transform=axes.get_yaxis_transform())
        if slo_s is not None:
            axes.axvline(1e3 * slo_s, color=SLO_COLOUR, ls="--", lw=1.2)
            axes.text(1e3 * slo_s, 118, f" SLO {seconds_text(slo_s)}", color=SLO_COLOUR, va="top")
        axes.legend(loc="lower left")
        axes.set_title(title or f"{what[:1].upper()}{what[1:]}: the longest ones")


def throughput_latency(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    slos: Mapping[str, float],
    path: Path,
    *,
    load: str = "load [requests/s]",
    latency: str = "P99 time between tokens [s]",
    title: str = "Latency over load",
) -> None:
    """A latency over a load, one curve a policy, with the load at which each curve crosses a promise.

    Args:
      curves: (load, seconds) by policy; infinite seconds are drawn as an arrow that leaves the picture.
      slos: seconds by name, drawn as lines.
      path: of the picture.
      load, latency: what the axes show.
      title: over the picture.

    Raises:
      PlotError: no finite point, or see `picture`.
    """
    finite = [seconds for points in curves.values() for _, seconds in points if 0 < seconds < math.inf]
    if not finite:
        raise PlotError(f"{path}: no curve has a point to draw")
    top = 2 * max([*finite, *slos.values()])
    with picture(path, (7.5, 4.8)) as axes:
        for name, style in line_styles(curves).items():
            points = sorted(curves[name])
            inside = [(at, seconds) for at, seconds in points if seconds < math.inf]
            axes.plot(*zip(*inside, strict=True), marker="o", ms=4, lw=1.8, label=name, **style) if inside else None
            for at, seconds in points:
                if seconds == math.inf:
                    axes.plot(at, top / 1.15, marker="^", ms=7, color=style["color"], clip_on=False)
            for slo_s in slos.values():
                at = crossing(points, slo_s)
                if at is not None:
                    axes.plot(at, slo_s, marker="o", ms=10, mfc="none", mew=1.6, color=style["color"])
                    axes.annotate(
                        f"{at:.3g}", (at, slo_s), (4, -12), textcoords="offset points", color=style["color"], size=9
                    )
        for name, slo_s in slos.items():
            axes.axhline(slo_s, color=SLO_COLOUR, ls="--", lw=1)
            text = f"{name}: {seconds_text(slo_s)}"
            axes.text(1, slo_s, f" {text}", color=SLO_COLOUR, va="center", transform=axes.get_yaxis_transform())
        axes.set(yscale="log", xlabel=load, ylabel=latency, ylim=(0.7 * min([*finite, *slos.values()]), top))
        plain_ticks(axes.yaxis)
        axes.set_xlim(left=0)
        axes.grid(axis="y", which="major", color="#dddddd", lw=0.6)
        axes.legend(loc="upper left")
        axes.set_title(f"{title}; a ring is where a promise ends to be kept" if slos else title)


def crossing(points: Sequence[tuple[float, float]], slo_s: float) -> float | None:
    """The load from which on a curve is above a promise: between two points by the logarithm of their latencies.

    Args:
      points: (load, seconds), ascending loads.
      slo_s: the promise.

    Returns:
      None where it begins above it, or never is; a point before an infinite one where that follows.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 <= slo_s < y1:
            if y1 == math.inf or y0 <= 0:
                return x0
            return x0 + (x1 - x0) * math.log(slo_s / y0) / math.log(y1 / y0)
    return None


def latency_curves(table: LatencyTable, path: Path) -> None:
    """A latency table: the time of every program over the fill of the cache, of many decodes, of one, of one prompt.

    Args:
      table: measured.
      path: of the picture.

    Raises:
      PlotError: see `picture`.
    """
    colours = {bucket: str(0.75 - 0.75 * i / len(table.buckets)) for i, bucket in enumerate(table.buckets)}
    with picture(path, (10, 4.4), ncols=2, sharey=True) as (decodes, prompts):
        for bucket in table.buckets:
            its = [timing for timing in table.timings if timing.bucket == bucket]
            most = max(timing.num_decodes for timing in its)
            for number in sorted({timing.num_decodes for timing in its}):
                points = sorted(
                    (timing.num_decode_keys if number else timing.num_prefill_keys, 1e3 * timing.seconds)
                    for timing in its
                    if timing.num_decodes == number
                )
                axes = decodes if number else prompts
                line = "--" if 0 < number < most else "-"
                axes.plot(
                    *zip(*points, strict=True), line, marker="o", ms=4, color=colours[bucket], label=f"{bucket} tokens"
                )
        decodes.set(yscale="log", xlabel="keys that the decodes read", ylabel="step [ms]")
        plain_ticks(decodes.yaxis)
        prompts.set(xlabel="keys that the prompt's queries read, summed")
        decodes.set_title("Steps of decodes (dashed: of one)")
        prompts.set_title("Steps of one prompt")
        prompts.legend(loc="lower right")
        for axes in (decodes, prompts):
            axes.grid(color="#dddddd", lw=0.6)


def _tail(observed: Observations) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and the share that took longer, of so few points that a picture stays small."""
    seconds, shares = survival(observed.values, observed.longer_than)
    if len(seconds) > _MOST_POINTS:
        # Evenly over the logarithm of the share: the tail keeps its points.
        wanted = np.geomspace(1, max(float(shares[shares > 0].min()), 1e-9), _MOST_POINTS)
        kept = np.unique(np.append(np.searchsorted(-shares, -wanted), len(seconds) - 1))
        seconds, shares = seconds[np.minimum(kept, len(seconds) - 1)], shares[np.minimum(kept, len(seconds) - 1)]
    # From the first value backwards all of them took longer.
    return np.append(seconds[:1], seconds), np.append(1.0, shares)
