"""The page and the picture of `sarathi_jax.bench.fidelity`."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sarathi_jax.bench.paper.markdown import number, table
from sarathi_jax.telemetry.definitions import MEDIAN_DELAY_SLO_S
from sarathi_jax.telemetry.plots.style import line_styles, picture, plain_ticks

_CLOSE = 0.10
_METRICS = {"p50_ttft_s": "P50 TTFT", "p99_tbt_s": "P99 TBT"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One number of the simulator's, and the same of identical real runs.

    Attributes:
      case: model and policy.
      what: is compared.
      load: requests a second; None: a capacity.
      requests: of each run; None: of a search it depends on the rate.
      simulated: by the simulator.
      real: by the engine.
    """

    case: tuple[str, str]
    what: str
    load: float | None
    requests: int | None
    simulated: float
    real: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the real runs."""
        return sum(self.real) / len(self.real)

    @property
    def error(self) -> float:
        """How far the simulator is from the mean of the real runs, as a share of it.

        Infinite where the simulator alone found a capacity.
        """
        if not self.mean:
            return math.inf if self.simulated else 0.0
        return self.simulated / self.mean - 1

    @property
    def spread(self) -> float:
        """How far two real runs are from each other, the mean of all pairs, as a share of their mean."""
        apart = [abs(one - other) for one, other in itertools.combinations(self.real, 2)]
        return sum(apart) / len(apart) / self.mean if self.mean else 0.0

    @property
    def is_close(self) -> bool:
        """Within a tenth, or within the spread of identical runs where that is larger."""
        return abs(self.error) <= max(_CLOSE, self.spread)


def comparisons(parts: Mapping[str, Any], cases: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Everything that was measured of these cases.

    Args:
      parts: as `fidelity.json` has them.
      cases: model and policy.
    """
    found = []
    for case in cases:
        say = " ".join(case)
        of_case = {name.removeprefix(f"{say} "): part for name, part in parts.items() if name.startswith(f"{say} ")}
        for load in (name.removeprefix("sim ") for name in of_case if name.startswith("sim ")):
            real, simulated = _rounds(of_case, f"real {load} "), of_case[f"sim {load}"]
            for key, what in _METRICS.items():
                values = tuple(run[key] for run in real)
                found.append(Comparison(case, what, float(load), simulated["requests"], simulated[key], values))
        if real := _rounds(of_case, "capacity real "):
            values = tuple(run["requests_per_s"] for run in real)
            found.append(Comparison(case, "capacity", None, None, of_case["capacity sim"]["requests_per_s"], values))
    return found


def _rounds(parts: Mapping[str, Any], start: str) -> list[Mapping[str, Any]]:
    return [part for name, part in parts.items() if name.startswith(start)]


def page(parts: Mapping[str, Any], cases: Sequence[tuple[str, str]], machine: str, seconds: float) -> str:
    """Markdown: a row a number.

    Args:
      parts, cases: as of `comparisons`.
      machine: in words.
      seconds: for which requests came in each run.
    """
    found = comparisons(parts, cases)
    too_much = 2 * MEDIAN_DELAY_SLO_S / seconds
    slos = ", ".join(f"{_text('', parts[f'{name} slo'])} ({name})" for name in dict.fromkeys(case[0] for case in cases))
    num_close = sum(one.is_close for one in found)
    rows = [
        [
            *one.case,
            "" if one.load is None else f"{one.load:.3g}",
            one.requests or "",
            one.what,
            _text(one.what, one.simulated),
            _text(one.what, *one.real),
            f"{one.error:+.1%}",
            f"{one.spread:.1%}",
            "yes" if one.is_close else "**no**",
        ]
        for one in found
    ]
    header = ["model", "policy", "requests/s", "requests", "what", "simulated", "real", "error", "spread", "close"]
    within = sum(abs(one.error) <= _CLOSE for one in found)
    return f"""# The simulator against the real engine

On {machine}: {num_close} of {len(found)} numbers are close, {within} of them within 10 %.

Chat requests (the paper's quantiles) scaled to the model's context, at three loads, the same for all policies: shares
of the throughput of the first one when all requests come at once. They come for {seconds:g} s in each run, or longer
where that are too few. *Error* is the simulated number against the mean of identical real runs, *spread* how far
two of these are apart (the mean of all pairs); *close* means an error of at most 10 %, or of at most the spread where
that is larger. Capacities are of a P99 TBT of at most {slos} and a median delay of at most
{MEDIAN_DELAY_SLO_S:g} s; where the delay is what breaks, so short a run gives up to {too_much:.0%} too much, to both
alike.

The simulator goes by a table of the programs' times, corrected by what steps took while other requests were served
before each of the real runs (`simulate/in_service.py`); none of the steps that are compared is in it. What that
rests on, where it fails, and what fewer runs say: [decisions/latency-table.md](decisions/latency-table.md).

![simulated and real](fidelity.svg)

{table(header, rows)}

The numbers are in [fidelity.json](fidelity.json). Made by
`python -m sarathi_jax.bench.fidelity --page docs/fidelity.md` on an otherwise idle machine.
"""


def draw(parts: Mapping[str, Any], cases: Sequence[tuple[str, str]], path: Path) -> None:
    """Simulated over real, a panel a metric: what is alike lies on the diagonal, in a band of a tenth either way."""
    # A search that found no capacity has no place on a scale of ratios.
    found = [one for one in comparisons(parts, cases) if one.simulated and all(one.real)]
    kinds = [what for what in (*_METRICS.values(), "capacity") if any(one.what == what for one in found)]
    with picture(path, (1 + 4.4 * len(kinds), 4.4), ncols=len(kinds), squeeze=False) as grid:
        for axes, what in zip(grid[0], kinds, strict=True):
            _draw(axes, what, [one for one in found if one.what == what])


def _draw(axes: Any, what: str, found: Sequence[Comparison]) -> None:
    unit = "requests/s" if what == "capacity" else "s"
    values = [value for one in found for value in (one.simulated, *one.real)]
    ends = 0.8 * min(values), 1.25 * max(values)
    axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="#eeeeee", label="10 %")
    axes.plot(ends, ends, color="#999999", lw=1)
    styles = line_styles(list(dict.fromkeys(one.case[1] for one in found)))
    models = list(dict.fromkeys(one.case[0] for one in found))
    for model, marker in zip(models, "os^D", strict=False):
        for policy, style in styles.items():
            its = [one for one in found if one.case == (model, policy)]
            mean = [one.mean for one in its]
            spread = [[one.mean - min(one.real) for one in its], [max(one.real) - one.mean for one in its]]
            simulated = [one.simulated for one in its]
            label = f"{model}, {policy}"
            axes.errorbar(mean, simulated, xerr=spread, fmt=marker, ms=6, color=style["color"], label=label, capsize=2)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"real [{unit}]", ylabel=f"simulated [{unit}]")
    for axis in (axes.xaxis, axes.yaxis):
        plain_ticks(axis)
    axes.set_title(what)
    axes.legend(loc="best", fontsize=7)


def _text(what: str, *values: float) -> str:
    scale, unit = (1, "/s") if what == "capacity" else (1e3, " ms")
    return ", ".join(number(scale * value) for value in values) + unit
