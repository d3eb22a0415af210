"""The largest request rate within an SLO: every deployment, trace and SLO, for Sarathi, vLLM and Orca."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from sarathi_jax.bench.paper.deployments import Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import table
from sarathi_jax.bench.paper.parallel import in_parallel
from sarathi_jax.bench.paper.pictures import grouped_bars
from sarathi_jax.bench.paper.served import Level, Served, workload
from sarathi_jax.simulate.capacity import Capacity, find_capacity
from sarathi_jax.simulate.probes import simulated

POLICIES = ("sarathi", "vllm", "orca")
type Group = tuple[str, Trace, Level]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is searched.

    Attributes:
      served: deployments with their promises.
      traces: whose lengths.
      number: requests of a run.
      seeds: runs at each rate, which are pooled.
      tolerance: of a capacity.
    """

    served: tuple[Served, ...]
    traces: tuple[Trace, ...]
    number: int
    seeds: tuple[int, ...]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's ratios on the chat trace: by baseline, deployment, level; what is not published is left out.

    Attributes:
      sarathi_to: the ratios.
      notes: what to say about each deployment.
    """

    sarathi_to: dict[str, dict[str, dict[Level, float]]]
    notes: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One search."""

    served: Served
    trace: Trace
    level: Level
    policy: str
    number: int
    seeds: tuple[int, ...]
    tolerance: float


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    if options.quick:
        settings = dataclasses.replace(
            settings, served=settings.served[:1], traces=settings.traces[:1], number=192, seeds=(0,), tolerance=0.2
        )
    cells = [
        Cell(served, trace, level, policy, settings.number, settings.seeds, settings.tolerance)
        for served in settings.served
        for trace in settings.traces
        for level in served.slo_s
        for policy in POLICIES
    ]
    found = in_parallel(search, cells, options, "capacities")
    rate: dict[tuple[str, Trace, Level, str], float] = {
        (cell.served.title, cell.trace, cell.level, cell.policy): capacity.rate
        for cell, capacity in zip(cells, found, strict=True)
    }
    groups: Sequence[Group] = tuple(dict.fromkeys(key[:3] for key in rate))
    num_won = sum(rate[*group, "sarathi"] >= max(rate[*group, policy] for policy in POLICIES) for group in groups)
    rows = list(map(_row, cells, found))
    verdict = f"Sarathi has the largest capacity in {num_won} of {len(groups)} cells"
    text = [f"{verdict}.", _ratios(groups, rate, paper)]
    text += [f"{name}: {note}" for name, note in paper.notes.items()]
    text += ["All capacities, with what breaks beyond them:", _capacities(rows)]
    pictures = {}
    for trace in settings.traces:
        bars = {
            f"{title}\n{level}": {policy: rate[title, own, level, policy] for policy in POLICIES}
            for title, own, level in groups
            if own == trace
        }
        title = f"Capacity, {trace} trace"
        pictures[f"capacity-{trace}"] = functools.partial(grouped_bars, bars, title=title, y="requests/s", marks={})
    return Section(verdict, "\n\n".join(text), {"capacities": rows}, pictures)


def search(cell: Cell) -> Capacity:
    """The capacity of a cell."""
    deployment = cell.served.build(cell.policy, cell.trace, cell.level)
    probe = simulated(deployment, functools.partial(workload, cell.trace, cell.number))
    slo_s = cell.served.slo_s[cell.level]
    return find_capacity(probe, tbt_slo_s=slo_s, seeds=cell.seeds, tolerance=cell.tolerance)


def _row(cell: Cell, capacity: Capacity) -> dict[str, object]:
    at = capacity.at_capacity
    return {
        "deployment": cell.served.title,
        "trace": cell.trace,
        "slo": cell.level,
        "policy": cell.policy,
        "requests_per_s": capacity.rate,
        "bound": capacity.bound,
        "p99_tbt_s": None if at is None else at.p99_tbt_s,
        "median_delay_s": None if at is None else at.median_delay_s,
    }


def _ratios(groups: Sequence[Group], rate: Mapping[tuple[str, Trace, Level, str], float], paper: Paper) -> str:
    """Sarathi to each baseline, beside the paper's ratio on the chat trace."""
    rows = []
    for title, trace, level in groups:
        row: list[object] = [title, trace, level]
        for baseline in POLICIES[1:]:
            own, other = rate[title, trace, level, "sarathi"], rate[title, trace, level, baseline]
            theirs = paper.sarathi_to.get(baseline, {}).get(title, {}).get(level) if trace == "chat" else None
            row += [own / other if other else float("inf"), theirs]
        rows.append(row)
    header = ["deployment", "trace", "SLO", "to vLLM", "paper", "to Orca", "paper"]
    return table(header, rows)


def _capacities(rows: list[dict[str, object]]) -> str:
    header = ["deployment", "trace", "SLO", "policy", "requests/s", "breaks", "P99 TBT there, s", "median delay, s"]
    return table(header, [list(row.values()) for row in rows])
