"""A budget chosen for every step by what was promised, against the best fixed budget of each cell."""

import dataclasses
import functools

from sarathi_jax.bench.paper.deployments import Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import table
from sarathi_jax.bench.paper.parallel import in_parallel
from sarathi_jax.bench.paper.pictures import grouped_bars
from sarathi_jax.bench.paper.served import Level, Served, fixed_budget, workload
from sarathi_jax.simulate import Deployment
from sarathi_jax.simulate.capacity import Capacity, find_capacity
from sarathi_jax.simulate.probes import simulated

_DYNAMIC = "by the SLO"


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
    """One search.

    Attributes:
      budget: a fixed one; None: by the SLO.
    """

    served: Served
    trace: Trace
    level: Level
    budget: int | None
    settings: Settings

    @property
    def name(self) -> str:
        """Of the budget."""
        return _DYNAMIC if self.budget is None else str(self.budget)

    def build(self) -> Deployment:
        """The deployment with this budget."""
        if self.budget is not None:
            fixed = dataclasses.replace(self.served, budget={self.level: self.budget})
            return fixed.build("sarathi", self.trace, self.level)
        limits = fixed_budget(self.settings.step_sizes[-1]) | {"token_buckets": self.settings.step_sizes}
        built = dataclasses.replace(self.served, budget={self.level: self.settings.step_sizes[-1]})
        deployment = built.build("sarathi", self.trace, self.level)
        promised = {"tbt_slo_ms": 1e3 * self.served.slo_s[self.level]}
        return dataclasses.replace(deployment, engine=dataclasses.replace(deployment.engine, **limits, **promised))


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    if options.quick:
        settings = dataclasses.replace(
            settings, served=settings.served[:1], traces=settings.traces[:1], number=64, seeds=(0,), tolerance=0.2
        )
    cells = [
        Cell(served, trace, level, budget, settings)
        for served in settings.served
        for trace in settings.traces
        for level in served.slo_s
        for budget in (None, *settings.budgets)
    ]
    found = dict(zip([_key(cell) for cell in cells], in_parallel(search, cells, options, "budgets"), strict=True))
    rows, bars, num_kept = [], dict[str, dict[str, float]](), 0
    for group in dict.fromkeys(key[:3] for key in found):
        title, trace, level = group
        fixed = {str(budget): found[*group, str(budget)].rate for budget in settings.budgets}
        dynamic, best = found[*group, _DYNAMIC], max(fixed, key=lambda name: fixed[name])
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


def search(cell: Cell) -> Capacity:
    """The capacity of a cell."""
    settings = cell.settings
    probe = simulated(cell.build(), functools.partial(workload, cell.trace, settings.number))
    slo_s = cell.served.slo_s[cell.level]
    return find_capacity(probe, tbt_slo_s=slo_s, seeds=settings.seeds, tolerance=settings.tolerance)


def _key(cell: Cell) -> tuple[str, Trace, Level, str]:
    return cell.served.title, cell.trace, cell.level, cell.name
