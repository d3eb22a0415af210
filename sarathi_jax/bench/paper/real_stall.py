"""Generation stalls of the engine itself: the same requests under each policy, token by token."""

import dataclasses
import functools
import sys
from collections.abc import Mapping

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
    longer, tail = (float(other[key]) / float(ours[key]) for key in ("longest_wait_s", "p99_tbt_s"))
    header = ["", "longest wait, s", "P99 TBT, s", "P50 TBT, s", "P50 TTFT, s"]
    text = [
        measured_on(settings.trace),
        table(header, [list(row.values()) for row in rows]),
        f"{number} requests at {settings.rate:g} requests/s, the same for all. The longest wait for a token under "
        f"{other['line']} is {longer:.1f} times that under {ours['line']}, the P99 {tail:.1f} times. The first picture "
        "is the answer with the longest wait of all, under each policy.",
    ]
    return Section(
        f"the longest wait for a token under {other['line']} is {longer:.1f} times that under {ours['line']}, the P99 "
        f"{tail:.1f} times",
        "\n\n".join(text),
        {"waits": rows},
        {
            "stall": functools.partial(generation_stall, runs),
            "tail": functools.partial(quantiles, {name: run.tbts for name, run in runs.items()}),
        },
    )


def waits(runs: Mapping[str, Run]) -> list[dict[str, str | float]]:
    """What those who read had to wait, a row a line; what the end of the run cut off counts as far as it came."""
    return [
        {
            "line": line,
            "longest_wait_s": max(run.tbts.values + run.tbts.longer_than),
            "p99_tbt_s": run.tbts.quantile(0.99),
            "p50_tbt_s": run.tbts.quantile(0.5),
            "p50_ttft_s": run.ttfts.quantile(0.5),
        }
        for line, run in runs.items()
    ]
