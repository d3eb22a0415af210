"""Throughput against latency: the load that each policy takes, by how long a reader may wait between tokens."""

import dataclasses
import functools

from sarathi_jax.bench.paper.deployments import DeploymentSettings, Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.loads import Claim, Loads, Point, point, verdict
from sarathi_jax.bench.paper.parallel import in_parallel
from sarathi_jax.bench.paper.served import fixed_budget, workload
from sarathi_jax.simulate.probes import simulated

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
class Paper:
    """The paper's ratios."""

    claims: tuple[Claim, ...]


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
    loads = Loads(points, settings.slos_s)
    comparisons = loads.compare(paper.claims)
    rows = [dataclasses.asdict(point) for point in points]
    return Section(verdict(comparisons[0]), loads.text(comparisons), {"runs": rows}, {"tradeoff": loads.draw})


def serve(cell: _Cell) -> Point:
    """One line at one rate."""
    settings, line = cell.settings, cell.line
    limits = fixed_budget(line.budget)
    deployment = settings.deployment.build(policy=line.policy, max_num_seqs=line.max_num_seqs, **limits)
    probe = simulated(deployment, functools.partial(workload, settings.trace, settings.number))
    return point(line.name, cell.rate, probe(cell.rate, settings.seed))
