"""The load that each line takes by how long a reader may wait between tokens: points, tables and the two pictures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sarathi_jax.bench.paper.markdown import Comparison, comparison_table, table
from sarathi_jax.bench.paper.pictures import Panel, panels
from sarathi_jax.telemetry.definitions import MEDIAN_DELAY_SLO_S
from sarathi_jax.telemetry.run import Run


@dataclasses.dataclass(frozen=True)
class Claim:
    """A ratio that the paper reports.

    Attributes:
      line: that takes so many times the load of the best of `others`.
      others: prefix of the names of the lines that it is compared with.
      slo_s: at which.
      ratio: of the paper.
    """

    line: str
    others: str
    slo_s: float
    ratio: float


@dataclasses.dataclass(frozen=True)
class Point:
    """A run.

    Attributes:
      line: that served.
      rate: requests a second.
      p99_tbt_s, median_delay_s: of the run.
    """

    line: str
    rate: float
    p99_tbt_s: float
    median_delay_s: float


def point(line: str, rate: float, run: Run) -> Point:
    """What counts of a run."""
    return Point(line, rate, run.tbts.quantile(0.99), run.scheduling_delays.quantile(0.5))


def load(points: Sequence[Point], line: str, slo_s: float) -> float:
    """The largest rate of a line that keeps an SLO; 0: none of those tried."""
    kept = [
        point.rate
        for point in points
        if point.line == line and point.p99_tbt_s <= slo_s and point.median_delay_s <= MEDIAN_DELAY_SLO_S
    ]
    return max(kept, default=0.0)


@dataclasses.dataclass(frozen=True)
class Loads:
    """Runs of several lines at the same rates.

    Attributes:
      points: of all lines.
      slos_s: P99 of the times between tokens, ascending.
    """

    points: Sequence[Point]
    slos_s: Sequence[float]

    @property
    def by_line(self) -> dict[str, list[float]]:
        """The load of each line within each SLO."""
        lines = dict.fromkeys(point.line for point in self.points)
        return {line: [load(self.points, line, slo_s) for slo_s in self.slos_s] for line in lines}

    def compare(self, claims: Sequence[Claim]) -> list[Comparison]:
        """Ours beside the paper's ratios."""
        loads, comparisons = self.by_line, []
        for claim in claims:
            index = self.slos_s.index(claim.slo_s)
            best = max(values[index] for name, values in loads.items() if name.startswith(claim.others))
            ours = loads[claim.line][index] / best if best else float("inf")
            what = f"{claim.line} to the best {claim.others} at {claim.slo_s:g} s"
            comparisons.append(Comparison(what, ours, claim.ratio))
        return comparisons

    def text(self, comparisons: Sequence[Comparison]) -> str:
        """Comparisons and all loads as Markdown."""
        loads, rates = self.by_line, sorted({point.rate for point in self.points})
        rows = [[slo_s, *(values[i] for values in loads.values())] for i, slo_s in enumerate(self.slos_s)]
        parts = [
            comparison_table(comparisons),
            f"The largest rate, requests/s, of those tried ({', '.join(f'{rate:g}' for rate in rates)}) with so "
            f"long a P99 TBT and a median scheduling delay of at most {MEDIAN_DELAY_SLO_S:g} s:",
            table(["P99 TBT up to, s", *loads], rows),
        ]
        return "\n\n".join(parts)

    def draw(self, path: Path) -> None:
        """Latency over load, and load over what latency is allowed."""
        loads = self.by_line
        latencies = Panel(
            "P99 TBT under load",
            {line: [(p.rate, p.p99_tbt_s) for p in self.points if p.line == line] for line in loads},
            "requests/s",
            "P99 TBT [s]",
            y_scale="log",
            from_zero=False,
        )
        capacities = Panel(
            "Load within an SLO",
            {name: list(zip(self.slos_s, values, strict=True)) for name, values in loads.items()},
            "P99 TBT allowed [s]",
            "requests/s",
        )
        panels([latencies, capacities], path)


def verdict(comparison: Comparison) -> str:
    """The first ratio in a line."""
    return f"{comparison.what}: {comparison.ours:.2f} times the load (paper: {comparison.paper:g})"
