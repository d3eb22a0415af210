"""Throughput against latency on the engine itself; the simulated twin is `tradeoff`."""

import dataclasses
import sys

from tqdm import tqdm

from sarathi_jax.bench.paper.deployments import Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.loads import Claim, Loads, Point, point, verdict
from sarathi_jax.bench.paper.real import Engines, measured_on, serve


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      engines: the lines.
      trace: whose lengths.
      rates: requests a second, ascending.
      quick_rates: in their place, in the quick version.
      slos_s: P99 of the times between tokens, ascending.
      seconds: for which requests come, at every rate.
      quick_seconds: likewise, in the quick version.
      limit: a run is cut off after so many times `seconds`; what has not come by then counts as longer.
      seed: of the requests.
    """

    engines: Engines
    trace: Trace
    rates: tuple[float, ...]
    quick_rates: tuple[float, ...]
    slos_s: tuple[float, ...]
    seconds: float
    quick_seconds: float
    limit: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's ratios, of another deployment."""

    claims: tuple[Claim, ...]


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    engines, rates, seconds = settings.engines.of(options), settings.rates, settings.seconds
    if options.quick:
        rates, seconds = settings.quick_rates, settings.quick_seconds
    points = list[Point]()
    with tqdm(total=len(engines.lines) * len(rates), desc="loads", leave=False, file=sys.stderr) as bar:
        for line in engines.lines:
            with engines.open(line) as llm:
                for rate in rates:
                    number, limit_s = max(1, round(rate * seconds)), settings.limit * seconds
                    run = serve(llm, settings.trace, rate, number, settings.seed, limit_s)
                    points.append(point(line, rate, run))
                    bar.update()
    loads = Loads(points, settings.slos_s)
    comparisons = loads.compare(paper.claims)
    text = f"{measured_on(settings.trace)} Requests come for {seconds:g} s at each rate.\n\n{loads.text(comparisons)}"
    rows = [dataclasses.asdict(one) for one in points]
    return Section(verdict(comparisons[0]), text, {"runs": rows}, {"tradeoff": loads.draw})
