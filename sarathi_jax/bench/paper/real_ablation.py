"""Each idea alone on the engine itself; the simulated twin, at the paper's size, is `ablation`."""

import dataclasses
import functools
import sys
from collections.abc import Mapping

from tqdm import tqdm

from sarathi_jax.bench.paper.deployments import Trace
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import Order, order_list, table
from sarathi_jax.bench.paper.pictures import grouped_bars
from sarathi_jax.bench.paper.real import Engines, measured_on, serve

_METRICS = ("P50 TTFT", "P99 TBT")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      engines: a line for each idea; the last one has both, and the others are drawn relative to it.
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


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's numbers, of another model on other devices: their order and their ratios are compared.

    Attributes:
      cells: median time to first token and P99 of the times between tokens, in seconds, by line.
    """

    cells: dict[str, tuple[float, float]]


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    engines = settings.engines.of(options)
    number = settings.quick_number if options.quick else settings.number
    cells = dict[str, tuple[float, float]]()
    for line in tqdm(engines.lines, "lines", leave=False, file=sys.stderr):
        with engines.open(line) as llm:
            run = serve(llm, settings.trace, settings.rate, number, settings.seed)
        cells[line] = run.ttfts.quantile(0.5), run.tbts.quantile(0.99)
    both = list(cells)[-1]
    ours, theirs = relative(cells, both), relative(paper.cells, both)
    orders = [
        Order.of(metric, *({line: cell[i] for line, cell in of.items()} for of in (cells, paper.cells)))
        for i, metric in enumerate(_METRICS)
    ]
    rows = [
        {
            "line": line,
            "p50_ttft_s": cell[0],
            "p99_tbt_s": cell[1],
            **{f"{metric} to {both}": ours[metric][line] for metric in _METRICS},
            **{f"{metric} to {both}, paper": theirs[metric].get(line) for metric in _METRICS},
        }
        for line, cell in cells.items()
    ]
    header = ["", "P50 TTFT, s", "P99 TBT, s", *list(rows[0])[3:]]
    text = [
        measured_on(settings.trace),
        f"{number} requests at {settings.rate:g} requests/s, the same for all.",
        table(header, [list(row.values()) for row in rows]),
        order_list(orders),
    ]
    title = f"Each idea alone: {both} = 1, lower is better"
    pictures = {"ideas": functools.partial(grouped_bars, ours, title=title, y=f"times that of {both}", marks=theirs)}
    others = ", ".join(f"{line} {ours[_METRICS[1]][line]:.2f}" for line in cells if line != both)
    kept = sum(order.is_papers for order in orders)
    return Section(
        f"P99 TBT to that of {both}: {others}; {kept} of {len(orders)} orders of the policies as in the paper",
        "\n\n".join(text),
        {"cells": rows},
        pictures,
    )


def relative(cells: Mapping[str, tuple[float, float]], to: str) -> dict[str, dict[str, float]]:
    """Each metric of each line as a multiple of one line's."""
    return {metric: {line: cell[i] / cells[to][i] for line, cell in cells.items()} for i, metric in enumerate(_METRICS)}
