"""The largest request rate within an SLO on the engine itself; the simulated twin is `capacity`."""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from sarathi_jax.bench.paper.deployments import Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import table
from sarathi_jax.bench.paper.pictures import grouped_bars
from sarathi_jax.bench.paper.real import Engines, decode_step_s, measured_on, serve
from sarathi_jax.bench.paper.served import Level
from sarathi_jax.llm import LLM
from sarathi_jax.simulate.capacity import Capacity, find_capacity
from sarathi_jax.telemetry.definitions import MEDIAN_DELAY_SLO_S
from sarathi_jax.telemetry.run import Run

# Of the first rate that is tried: nothing lower or higher is.
_FARTHEST = 16
type Cell = tuple[str, Level]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is searched.

    Attributes:
      engines: the lines.
      policies: line of each policy, by level; the first policy is compared with the others.
      slo_decodes: multiples of a decode step that the P99 of the times between tokens may take, by level.
      decodes, context: of that decode step: sequences, tokens of each.
      decode_line: that it is measured on, once.
      trace: whose lengths.
      guess: requests a second to begin with.
      seconds: for which requests come, at every rate.
      limit: a run is cut off after so many times `seconds`; what has not come by then counts as longer.
      tolerance: of a capacity.
      quick_context, quick_seconds, quick_tolerance: in their place, in the quick version, which has the first level.
      seed: of the requests.
    """

    engines: Engines
    policies: dict[str, dict[Level, str]]
    slo_decodes: dict[Level, float]
    decodes: int
    context: int
    decode_line: str
    trace: Trace
    guess: float
    seconds: float
    limit: float
    tolerance: float
    quick_context: int
    quick_seconds: float
    quick_tolerance: float
    seed: int

    def __post_init__(self) -> None:
        lines = {self.decode_line, *(line for its in self.policies.values() for line in its.values())}
        for line in lines:
            if line not in self.engines.lines:
                raise ValueError(f"there is no line {line!r}; there are {', '.join(self.engines.lines)}")
        for policy, its in self.policies.items():
            if its.keys() != self.slo_decodes.keys():
                raise ValueError(f"policies.{policy} needs a line for each of {', '.join(self.slo_decodes)}")


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's ratios on the chat trace, of another deployment.

    Attributes:
      to: how many times the capacity of each baseline the first policy has, by level.
    """

    to: dict[str, dict[Level, float]]


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    if options.quick:
        settings = dataclasses.replace(
            settings,
            engines=settings.engines.of(options),
            policies={policy: dict(list(its.items())[:1]) for policy, its in settings.policies.items()},
            slo_decodes=dict(list(settings.slo_decodes.items())[:1]),
            context=settings.quick_context,
            seconds=settings.quick_seconds,
            tolerance=settings.quick_tolerance,
        )
    step_s, found = _search(settings)
    slos_s: dict[Level, float] = {level: multiple * step_s for level, multiple in settings.slo_decodes.items()}
    rows = [_row(cell, capacity) for cell, capacity in found.items()]
    rates: dict[Cell, float] = {cell: capacity.rate for cell, capacity in found.items()}
    first, *baselines = settings.policies
    ratios = {cell: ratio(rates[first, cell[1]], rates[cell]) for cell in rates if cell[0] != first}
    compared = [
        [policy, level, ratios[policy, level], paper.to.get(policy, {}).get(level)]
        for level in slos_s
        for policy in baselines
    ]
    delays = 2 * MEDIAN_DELAY_SLO_S / settings.seconds
    text = [
        measured_on(settings.trace),
        f"A step of {settings.decodes} decodes of {settings.context} tokens each takes {1e3 * step_s:.3g} ms. "
        + " ".join(
            f"The {level} SLO is {settings.slo_decodes[level]:g} times that, {1e3 * slo_s:.3g} ms."
            for level, slo_s in slos_s.items()
        ),
        f"{first} to each baseline, beside the paper's ratios:",
        table(["to", "SLO", "ours", "paper"], compared),
        "All capacities, with what breaks beyond them:",
        table(
            ["policy", "SLO", "requests/s", "broken from", "breaks", "P99 TBT, s", "median delay, s"],
            [list(row.values()) for row in rows],
        ),
        f"Requests come for {settings.seconds:g} s at each rate, the same for all. Where the delay is what breaks, "
        f"so short a run gives up to {delays:.0%} too much, for every policy alike.",
    ]
    bars = {
        f"{level}\n{1e3 * slo_s:.0f} ms": {policy: rates[policy, level] for policy in settings.policies}
        for level, slo_s in slos_s.items()
    }
    title = "Capacity: the largest rate within the SLO"
    verdict = "; ".join(
        f"{first} takes "
        + ", ".join(f"{ratios[policy, level]:.2f} times the load of {policy}" for policy in baselines)
        + f" ({level})"
        for level in slos_s
    )
    return Section(
        verdict,
        "\n\n".join(text),
        {"capacities": rows},
        {"capacity": functools.partial(grouped_bars, bars, title=title, y="requests/s", marks={})},
    )


def ratio(own: float, other: float) -> float:
    """Of two capacities; infinite where only the other is 0."""
    return own / other if other else float("inf") if own else float("nan")


def cells_by_line(policies: Mapping[str, Mapping[Level, str]], first: str) -> dict[str, list[Cell]]:
    """What is searched on each line, so that each engine is opened once.

    Args:
      policies: as of `Settings`.
      first: the line to begin with, searched or not.
    """
    cells: dict[str, list[Cell]] = {first: []}
    for policy, its in policies.items():
        for level, line in its.items():
            cells.setdefault(line, []).append((policy, level))
    return cells


def _search(settings: Settings) -> tuple[float, dict[Cell, Capacity]]:
    """Seconds of the decode step, and every capacity, in the order of the policies."""
    step_s, found = 0.0, dict[Cell, Capacity]()
    by_line = cells_by_line(settings.policies, settings.decode_line)
    with tqdm(desc="runs", leave=False, file=sys.stderr) as bar:
        for line, cells in by_line.items():
            with settings.engines.open(line) as llm:
                if line == settings.decode_line:
                    step_s = decode_step_s(llm, settings.decodes, settings.context)
                found |= _of_engine(llm, cells, step_s, settings, bar)
    return step_s, {(p, level): found[p, level] for level in settings.slo_decodes for p in settings.policies}


def _of_engine(llm: LLM, cells: Sequence[Cell], step_s: float, settings: Settings, bar: tqdm) -> dict[Cell, Capacity]:
    # One engine's run at a rate tells of every SLO.
    @functools.cache
    def probe(rate: float, seed: int) -> Run:
        number = max(1, round(rate * settings.seconds))
        run = serve(llm, settings.trace, rate, number, seed, settings.limit * settings.seconds)
        bar.update()
        return run

    return {
        (policy, level): find_capacity(
            probe,
            tbt_slo_s=settings.slo_decodes[level] * step_s,
            guess=settings.guess,
            step=1 + 2 * settings.tolerance,
            tolerance=settings.tolerance,
            seeds=(settings.seed,),
            lowest=settings.guess / _FARTHEST,
            highest=settings.guess * _FARTHEST,
        )
        for policy, level in cells
    }


def _row(cell: Cell, capacity: Capacity) -> dict[str, object]:
    at = capacity.at_capacity
    return {
        "policy": cell[0],
        "slo": cell[1],
        "requests_per_s": capacity.rate,
        "broken_from": capacity.below,
        "bound": capacity.bound,
        "p99_tbt_s": None if at is None else at.p99_tbt_s,
        "median_delay_s": None if at is None else at.median_delay_s,
    }
