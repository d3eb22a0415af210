"""Each idea alone: hybrid batches without chunks, chunks without hybrid batches, both; and what moves the results."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from sarathi_jax.bench.paper.deployments import TRACES, DeploymentSettings, Stack, Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import Comparison, Order, comparison_table, number, order_list, table
from sarathi_jax.bench.paper.parallel import in_parallel
from sarathi_jax.bench.paper.pictures import grouped_bars
from sarathi_jax.config import Policy
from sarathi_jax.simulate import Deployment, simulate
from sarathi_jax.telemetry.definitions import quantile
from sarathi_jax.workloads import TimedRequest, Workload, load_trace, poisson, shuffled, synthesise

_CLOSE = 0.25
_DRAWN = 3  # variations: more bars nobody can read


@dataclasses.dataclass(frozen=True)
class Variation:
    """Something that might explain a difference.

    Attributes:
      name: in tables.
      stack: see `DeploymentSettings`.
      token_budget: of the policies that cut prompts; None: the experiment's.
      longest_chunk: hybrid batches cut prompts after all, into chunks so long; None: never.
      as_harness: gaps between arrivals are cut at three times their mean, and a zero is counted as each request's first
        time between tokens, as the published harness does.
      rate: times the rate.
      recorded: file of the chat trace, if it is at hand; None: lengths drawn from the quantiles.
    """

    name: str
    stack: Stack = "published"
    token_budget: int | None = None
    longest_chunk: int | None = None
    as_harness: bool = False
    rate: float = 1.0
    recorded: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      deployment: its context and stack are those of the trace and the variation.
      rates: requests a second by trace.
      policies: in the order of the table.
      token_budget: of a step, of policies that cut prompts.
      num_requests: of a run.
      seeds: of the workload; medians over them are shown, and the least and the greatest.
      quick_seeds: likewise, in the quick version.
      variations: the first one is compared with the paper, the others show what moves it.
    """

    deployment: DeploymentSettings
    rates: dict[Trace, float]
    policies: tuple[Policy, ...]
    token_budget: int
    num_requests: int
    seeds: int
    quick_seeds: int
    variations: tuple[Variation, ...]


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's numbers.

    Attributes:
      cells: median time to first token and P99 of the times between tokens, in seconds, by trace and policy.
    """

    cells: dict[str, dict[str, tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run; `recorded` is the file of the variation's trace."""

    settings: Settings
    variation: Variation
    trace: Trace
    policy: Policy
    seed: int
    recorded: Path | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one run: median time to first token, P99 of times between tokens, decodes at once on average."""

    ttft_s: float
    tbt_s: float
    decodes: float


Cell = tuple[str, str, str]


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    jobs = _jobs(settings, options)
    outcomes = dict[Cell, list[Outcome]]()
    for job, outcome in zip(jobs, in_parallel(outcome_of, jobs, options, experiment.name), strict=True):
        outcomes.setdefault((job.variation.name, job.trace, job.policy), []).append(outcome)
    first = settings.variations[0].name
    pairs: list[tuple[str, str]] = [(trace, policy) for trace in settings.rates for policy in settings.policies]
    comparisons = []
    for trace, policy in pairs:
        theirs = paper.cells.get(trace, {}).get(policy, (None, None))
        of_cell = outcomes[first, trace, policy]
        for what, values, value in (
            ("P50 TTFT", [one.ttft_s for one in of_cell], theirs[0]),
            ("P99 TBT", [one.tbt_s for one in of_cell], theirs[1]),
        ):
            spread = f"over seeds {number(min(values))} to {number(max(values))} s"
            comparisons.append(Comparison(f"{trace}, {policy}: {what}", statistics.median(values), value, "s", spread))
    close = _close_by_variation(paper, outcomes)
    rows = [_row(cell, of_cell, paper) for cell, of_cell in outcomes.items()]
    orders = _orders(outcomes, first, pairs, paper)
    text = "\n\n".join(
        [
            f"## With {first}, {len(outcomes[first, *pairs[0]])} seeds: medians",
            comparison_table(comparisons),
            order_list(orders),
            "## What moves it",
            _variations_table(paper, outcomes, pairs, close),
            _little(outcomes, first, settings),
        ]
    )
    groups = {
        f"{trace}\n{policy}": {
            variation: statistics.median(one.tbt_s for one in outcomes[variation, trace, policy])
            for variation in list(close)[:_DRAWN]
        }
        for trace, policy in pairs
    }
    marks = {
        f"{trace}\n{policy}": dict.fromkeys(list(close)[:_DRAWN], paper.cells[trace][policy][1])
        for trace, policy in pairs
        if policy in paper.cells.get(trace, {})
    }
    total = sum(one.paper is not None for one in comparisons)
    best = max(close, key=lambda name: close[name])
    return Section(
        f"{close[first]} of {total} numbers within {_CLOSE:.0%} of the paper's with {first}, {close[best]} with "
        f"{best}; {sum(order.is_papers for order in orders)} of {len(orders)} orders of the policies as in "
        "the paper.",
        text,
        {"cells": rows},
        {
            "tbt": functools.partial(
                grouped_bars, groups, title="P99 TBT of each idea", y="seconds", marks=marks, y_scale="log"
            )
        },
    )


def outcome_of(job: Job) -> Outcome:
    """Simulates one cell with one seed."""
    requests = _requests(job)
    done = simulate(requests, _deployment(job), keep_steps=False)
    tbts_s = list(done.tbts.values) + [0.0] * (len(requests) if job.variation.as_harness else 0)
    generating_s = sum(sample.token_s[-1] - sample.token_s[0] for sample in done.samples)
    return Outcome(done.ttfts.quantile(0.5), quantile(tbts_s, 0.99), generating_s / done.end_s)


def clipped(rate: float, number: int, seed: int) -> list[float]:
    """Poisson arrivals with gaps of at most three times their mean, as the published harness has them."""
    gaps_s = (later - earlier for earlier, later in itertools.pairwise([0.0, *poisson(rate, number, seed)]))
    return list(itertools.accumulate(min(gap_s, 3 / rate) for gap_s in gaps_s))


def _jobs(settings: Settings, options: Options) -> list[Job]:
    jobs = []
    for variation in settings.variations[: 2 if options.quick else None]:
        recorded = options.find(variation.recorded) if variation.recorded is not None else None
        if variation.recorded is not None and recorded is None:
            continue
        for trace, policy in itertools.product(settings.rates, settings.policies):
            if variation.longest_chunk is not None and policy != "hybrid_only":
                continue
            if recorded is None or trace == "chat":
                seeds = settings.quick_seeds if options.quick else settings.seeds
                jobs += [Job(settings, variation, trace, policy, seed, recorded) for seed in range(seeds)]
    return jobs


def _requests(job: Job) -> list[TimedRequest]:
    rate = job.variation.rate * job.settings.rates[job.trace]
    arrivals = functools.partial(clipped if job.variation.as_harness else poisson, rate)
    if job.recorded is not None:
        lengths = functools.partial(shuffled, load_trace(job.recorded).lengths)
    else:
        lengths = functools.partial(synthesise, TRACES[job.trace])
    return Workload(lengths, arrivals, job.settings.num_requests, job.seed).requests()


def _deployment(job: Job) -> Deployment:
    variation, context = job.variation, TRACES[job.trace].longest
    deployment = dataclasses.replace(job.settings.deployment, context=context, stack=variation.stack)
    if job.policy != "hybrid_only":
        return deployment.build(policy=job.policy, token_budget=variation.token_budget or job.settings.token_budget)
    if variation.longest_chunk is not None:
        return deployment.build(policy="sarathi", token_budget=variation.longest_chunk)
    return deployment.build(policy="hybrid_only", token_budget=context)


def _medians(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    return statistics.median(one.ttft_s for one in outcomes), statistics.median(one.tbt_s for one in outcomes)


def _close_by_variation(paper: Paper, outcomes: dict[Cell, list[Outcome]]) -> dict[str, int]:
    """How many numbers of each variation are within a quarter of the paper's."""
    close = dict[str, int]()
    for name, trace, policy in outcomes:
        close.setdefault(name, 0)
        theirs = paper.cells.get(trace, {}).get(policy)
        if theirs is not None:
            ours = _medians(outcomes[name, trace, policy])
            close[name] += sum(abs(a / b - 1) <= _CLOSE for a, b in zip(ours, theirs, strict=True))
    return close


def _variations_table(
    paper: Paper,
    outcomes: dict[Cell, list[Outcome]],
    pairs: Sequence[tuple[str, str]],
    close: dict[str, int],
) -> str:
    def cell(values: tuple[float | None, float | None]) -> str:
        return " / ".join("-" if value is None else number(value) for value in values)

    header = ["", *(f"{trace} {policy}" for trace, policy in pairs), "numbers within 25 %"]
    rows = [["the paper", *(cell(paper.cells.get(t, {}).get(p, (None, None))) for t, p in pairs), ""]]
    for name in close:
        cells = [cell(_medians(outcomes[name, t, p])) if (name, t, p) in outcomes else "" for t, p in pairs]
        rows.append([name, *cells, f"{close[name]} of {2 * sum(map(bool, cells))}"])
    return "P50 TTFT / P99 TBT in seconds, medians over the seeds.\n\n" + table(header, rows)


def _orders(
    outcomes: dict[Cell, list[Outcome]], first: str, pairs: Sequence[tuple[str, str]], paper: Paper
) -> list[Order]:
    """The policies from best to worst, by trace and metric."""
    orders = []
    for trace in dict.fromkeys(trace for trace, _ in pairs):
        policies = [policy for of_trace, policy in pairs if of_trace == trace]
        for index, what in enumerate(("P50 TTFT", "P99 TBT")):
            ours = {policy: _medians(outcomes[first, trace, policy])[index] for policy in policies}
            theirs = {policy: cell[index] for policy, cell in paper.cells.get(trace, {}).items()}
            orders.append(Order.of(f"{trace}, {what}", ours, theirs))
    return orders


def _little(outcomes: dict[Cell, list[Outcome]], first: str, settings: Settings) -> str:
    """How many decode at once, which is what the cost of a sequence is multiplied by."""
    rows = [
        [trace, policy, statistics.median(one.decodes for one in outcomes[first, trace, policy])]
        for trace in settings.rates
        for policy in settings.policies
    ]
    return f"Requests that generate at once on average, {first}:\n\n" + table(["trace", "policy", "requests"], rows)


def _row(cell: Cell, outcomes: Sequence[Outcome], paper: Paper) -> dict[str, object]:
    name, trace, policy = cell
    theirs = paper.cells.get(trace, {}).get(policy, ("", ""))
    ttft_s, tbt_s = _medians(outcomes)
    return {
        "variation": name,
        "trace": trace,
        "policy": policy,
        "p50_ttft_s": ttft_s,
        "least_ttft_s": min(one.ttft_s for one in outcomes),
        "greatest_ttft_s": max(one.ttft_s for one in outcomes),
        "p99_tbt_s": tbt_s,
        "least_tbt_s": min(one.tbt_s for one in outcomes),
        "greatest_tbt_s": max(one.tbt_s for one in outcomes),
        "paper_ttft_s": theirs[0],
        "paper_tbt_s": theirs[1],
        "decodes": statistics.median(one.decodes for one in outcomes),
    }
