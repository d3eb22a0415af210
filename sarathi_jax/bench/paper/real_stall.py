"""Generation stalls of the engine itself: the same requests under each policy, token by token."""

import dataclasses
import functools
import sys
from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from sarathi_jax.bench.paper.deployments import Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import table
from sarathi_jax.bench.paper.real import Engines, measured_on, serve
from sarathi_jax.telemetry.plots import generation_stall, quantiles
from sarathi_jax.telemetry.run import Run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      engines: the first line is compared with the second.
      trace: whose lengths.
      rate: requests a second.
      number: of requests.
      quick_number: of them, in the quick version.
      seed: of the requests.
    """

    engines: Engines
    trace: Trace
    rate: float
    number: int
    quick_number: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.engines.lines) < 2:
            raise ValueError("engines: at least two lines are needed, to compare the first with the second")


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper draws a stall and gives no number."""


def run(experiment: Experiment, options: Options) -> Section:
    settings = experiment.settings_as(Settings)
    engines = settings.engines.of(options)
    number = settings.quick_number if options.quick else settings.number
    runs = dict[str, Run]()
    for line in tqdm(engines.lines, "lines", leave=False, file=sys.stderr):
        with engines.open(line) as llm:
            runs[line] = serve(llm, settings.trace, settings.rate, number, settings.seed)
    rows = waits(runs)
    ours, other = rows[:2]
    longer, tail = (_ratio(float(other[key]), float(ours[key])) for key in ("longest_stall_s", "p99_tbt_s"))
    verdict = (
        f"the longest stall of an answer under {other['line']} is {longer:.1f} times that under {ours['line']}, the "
        f"P99 TBT {tail:.1f} times"
    )
    stalls = longest_stalls(runs[str(other["line"])])
    worst = max(stalls, key=lambda request_id: stalls[request_id])
    header = ["", "longest stall, s", "longest wait, s", "P99 TBT, s", "P50 TBT, s", "P50 TTFT, s"]
    text = [
        measured_on(settings.trace),
        table(header, [list(row.values()) for row in rows]),
        f"{number} requests at {settings.rate:g} requests/s, the same for all: {verdict}. A stall is what steps with "
        "prompts take of a wait for a token; the rest of a wait may be anything, on a machine that others use, too. "
        f"The first picture is the answer with the longest stall under {other['line']}.",
    ]
    return Section(
        verdict,
        "\n\n".join(text),
        {"waits": rows},
        {
            "stall": functools.partial(generation_stall, runs, request_id=worst),
            "tail": functools.partial(quantiles, {name: run.tbts for name, run in runs.items()}),
        },
    )


def waits(runs: Mapping[str, Run]) -> list[dict[str, str | float]]:
    """What those who read had to wait, a row a line; what the end of the run cut off counts as far as it came."""
    return [
        {
            "line": line,
            "longest_stall_s": max(longest_stalls(run).values()),
            "longest_wait_s": max(run.tbts.values + run.tbts.longer_than),
            "p99_tbt_s": run.tbts.quantile(0.99),
            "p50_tbt_s": run.tbts.quantile(0.5),
            "p50_ttft_s": run.ttfts.quantile(0.5),
        }
        for line, run in runs.items()
    ]


def longest_stalls(run: Run) -> dict[str, float]:
    """By request, the most seconds of steps with prompts between two of its tokens.

    Args:
      run: its steps are those of one replica.
    """
    prompts = [step for steps in run.steps for step in steps if step.plan.num_tokens > step.plan.num_decodes]
    # Seconds of such steps up to any moment: knots of a line that rises while one runs.
    knots = [at_s for step in prompts for at_s in (step.started_s, step.ended_s)]
    passed = np.repeat(np.cumsum([0.0, *(step.duration_s for step in prompts)]), 2)[1:-1]
    stalls = {}
    for sample in run.samples:
        until = np.interp(sample.token_s, knots, passed) if knots else np.zeros(len(sample.token_s))
        stalls[sample.request_id] = float(max(np.diff(until), default=0.0))
    return stalls


def _ratio(other: float, ours: float) -> float:
    return other / ours if ours else float("inf")
