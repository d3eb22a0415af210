"""A budget chosen for every step by what was promised, against the best fixed budget of each cell."""

import dataclasses
import functools

from sarathi_jax.bench.paper.deployments import Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import table
from sarathi_jax.bench.paper.parallel import in_parallel
from sarathi_jax.bench.paper.pictures import grouped_bars
from sarathi_jax.bench.paper.served import Level, Served, workload
from sarathi_jax.simulate import Deployment
from sarathi_jax.simulate.capacity import Capacity, find_capacity
from sarathi_jax.simulate.probes import simulated

_DYNAMIC = "by the SLO"
_NEAR, _FAR = 1.25, 2.0  # factors by which a search goes on, from a good guess and from none


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is searched.

    Attributes:
      served: deployments with their promises; their own budgets are not used.
      traces: whose lengths.
      budgets: fixed ones, of which the best of each cell counts, with hindsight.
      step_sizes: of the dynamic budget, one setting for all cells.
      number: requests of a run.
      seeds: runs at each rate, the same for all settings.
      tolerance: of a capacity.
    """

    served: tuple[Served, ...]
    traces: tuple[Trace, ...]
    budgets: tuple[int, ...]
    step_sizes: tuple[int, ...]
    number: int
    seeds: tuple[int, ...]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Paper:
    """What is asked of the dynamic budget, which the paper left to future work.

    Attributes:
      least: its capacity to that of the best fixed budget, in every cell.
      least_strict_chat: by deployment, at the strict SLO on the chat trace.
    """

    least: float
    least_strict_chat: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One promise, for which every budget's capacity is searched."""

    served: Served
    trace: Trace
    level: Level
    settings: Settings

    def build(self, budget: int | None) -> Deployment:
        """The deployment with a fixed budget; None: by the SLO."""
        largest = self.settings.step_sizes[-1] if budget is None else budget
        built = dataclasses.replace(self.served, budget={self.level: largest})
        deployment = built.build("sarathi", self.trace, self.level)
        if budget is not None:
            return deployment
        engine = dataclasses.replace(
            deployment.engine,
            token_buckets=self.settings.step_sizes,
            tbt_slo_ms=1e3 * self.served.slo_s[self.level],
        )
        return dataclasses.replace(deployment, engine=engine)


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    if options.quick:
        settings = dataclasses.replace(
            settings, served=settings.served[:1], traces=settings.traces[:1], number=64, seeds=(0,), tolerance=0.2
        )
    cells = [
        Cell(served, trace, level, settings)
        for served in settings.served
        for trace in settings.traces
        for level in served.slo_s
    ]
    rows, bars, num_kept = [], dict[str, dict[str, float]](), 0
    for cell, (dynamic, *of_fixed) in zip(cells, in_parallel(search, cells, options, "promises"), strict=True):
        title, trace, level = cell.served.title, cell.trace, cell.level
        fixed = {str(budget): found.rate for budget, found in zip(settings.budgets, of_fixed, strict=True)}
        best = max(fixed, key=lambda name: fixed[name])
        ratio = dynamic.rate / fixed[best] if fixed[best] else float("inf")
        is_special = (trace, level) == ("chat", "strict") and title in paper.least_strict_chat
        least = paper.least_strict_chat[title] if is_special else paper.least
        num_kept += ratio >= least
        at = dynamic.at_capacity
        p99_s = None if at is None else at.p99_tbt_s
        rows.append([title, trace, level, *fixed.values(), dynamic.rate, p99_s, f"{ratio:.3f}", best, least])
        bars[f"{title}\n{trace}, {level}"] = {"best fixed": 1.0, _DYNAMIC: ratio}
    verdict = f"one dynamic budget is as good as asked in {num_kept} of {len(rows)} cells"
    header = ["deployment", "trace", "SLO", *map(str, settings.budgets), _DYNAMIC, "P99 TBT there, s"]
    header += [f"{_DYNAMIC} / best", "best fixed", "asked"]
    text = f"{verdict[0].upper()}{verdict[1:]}. Capacities in requests/s:\n\n{table(header, rows)}"
    pictures = {
        "slo": functools.partial(
            grouped_bars, bars, title="Capacity to that of the best fixed budget", y="ratio", marks={}
        )
    }
    return Section(verdict, text, {"capacities": [dict(zip(header, row, strict=True)) for row in rows]}, pictures)


def search(cell: Cell) -> list[Capacity]:
    """The capacities of a cell: by the SLO, then of each fixed budget, for which the first one says where to look."""
    settings, found = cell.settings, list[Capacity]()
    for budget in (None, *settings.budgets):
        near = found[0].rate if found else 0.0
        found.append(
            find_capacity(
                simulated(cell.build(budget), functools.partial(workload, cell.trace, settings.number)),
                tbt_slo_s=cell.served.slo_s[cell.level],
                seeds=settings.seeds,
                tolerance=settings.tolerance,
                guess=near or 1.0,
                step=_NEAR if near else _FAR,
            )
        )
    return found
