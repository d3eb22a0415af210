"""Throughput against latency: the load that each policy takes, by how long a reader may wait between tokens."""

import dataclasses
import functools
from collections.abc import Sequence

from sarathi_jax.bench.paper.deployments import DeploymentSettings, Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import Comparison, comparison_table, table
from sarathi_jax.bench.paper.parallel import in_parallel
from sarathi_jax.bench.paper.pictures import Panel, panels
from sarathi_jax.bench.paper.served import fixed_budget, workload
from sarathi_jax.simulate.probes import simulated
from sarathi_jax.telemetry.definitions import MEDIAN_DELAY_SLO_S

_QUICK_RATES = 3


@dataclasses.dataclass(frozen=True)
class Line:
    """One setting of a policy.

    Attributes:
      name: in tables and pictures.
      policy: of `EngineConfig`.
      budget: tokens of a step.
      max_num_seqs: sequences that may run at once.
    """

    name: str
    policy: str
    budget: int
    max_num_seqs: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      deployment: that serves.
      trace: whose lengths.
      lines: policies and their settings.
      rates: requests a second.
      slos_s: P99 of the times between tokens, ascending.
      number: requests of a run.
      seed: of all runs.
    """

    deployment: DeploymentSettings
    trace: Trace
    lines: tuple[Line, ...]
    rates: tuple[float, ...]
    slos_s: tuple[float, ...]
    number: int
    seed: int


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
class Paper:
    """The paper's ratios."""

    claims: tuple[Claim, ...]


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


@dataclasses.dataclass(frozen=True)
class _Cell:
    settings: Settings
    line: Line
    rate: float


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    if options.quick:
        settings = dataclasses.replace(settings, rates=settings.rates[:_QUICK_RATES], number=128)
    cells = [_Cell(settings, line, rate) for line in settings.lines for rate in settings.rates]
    points = in_parallel(serve, cells, options, "loads")
    loads = {line.name: [load(points, line.name, slo_s) for slo_s in settings.slos_s] for line in settings.lines}
    comparisons = []
    for claim in paper.claims:
        index = settings.slos_s.index(claim.slo_s)
        best = max(values[index] for name, values in loads.items() if name.startswith(claim.others))
        ours = loads[claim.line][index] / best if best else float("inf")
        what = f"{claim.line} to the best {claim.others} at {claim.slo_s:g} s"
        comparisons.append(Comparison(what, ours, claim.ratio))
    header = ["P99 TBT up to, s", *loads]
    rows = [[slo_s, *(values[i] for values in loads.values())] for i, slo_s in enumerate(settings.slos_s)]
    text = [
        comparison_table(comparisons),
        f"The largest rate, requests/s, of those tried ({', '.join(f'{rate:g}' for rate in settings.rates)}) with so "
        f"long a P99 TBT and a median scheduling delay of at most {MEDIAN_DELAY_SLO_S:g} s:",
        table(header, rows),
    ]
    first = comparisons[0]
    pictures = {"tradeoff": functools.partial(_draw, settings, points, loads)}
    verdict = f"{first.what}: {first.ours:.2f} times the load (paper: {first.paper:g})"
    return Section(verdict, "\n\n".join(text), {"runs": [dataclasses.asdict(point) for point in points]}, pictures)


def serve(cell: _Cell) -> Point:
    """One line at one rate."""
    settings, line = cell.settings, cell.line
    limits = fixed_budget(line.budget)
    deployment = settings.deployment.build(policy=line.policy, max_num_seqs=line.max_num_seqs, **limits)
    probe = simulated(deployment, functools.partial(workload, settings.trace, settings.number))
    came = probe(cell.rate, settings.seed)
    return Point(line.name, cell.rate, came.tbts.quantile(0.99), came.scheduling_delays.quantile(0.5))


def load(points: Sequence[Point], line: str, slo_s: float) -> float:
    """The largest rate of a line that keeps an SLO; 0: none of those tried."""
    kept = [
        point.rate
        for point in points
        if point.line == line and point.p99_tbt_s <= slo_s and point.median_delay_s <= MEDIAN_DELAY_SLO_S
    ]
    return max(kept, default=0.0)


def _draw(settings: Settings, points: Sequence[Point], loads: dict[str, list[float]], path) -> None:
    latencies = Panel(
        "P99 TBT under load",
        {line.name: [(p.rate, p.p99_tbt_s) for p in points if p.line == line.name] for line in settings.lines},
        "requests/s",
        "P99 TBT [s]",
        y_scale="log",
        from_zero=False,
    )
    capacities = Panel(
        "Load within an SLO",
        {name: list(zip(settings.slos_s, values, strict=True)) for name, values in loads.items()},
        "P99 TBT allowed [s]",
        "requests/s",
    )
    panels([latencies, capacities], path)
