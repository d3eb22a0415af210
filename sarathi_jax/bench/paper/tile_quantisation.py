"""What a few tokens beyond a multiple of the hardware's tile cost: by the roofline, and measured on this machine."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from sarathi_jax.bench.paper.batch_throughput import prompt_s
from sarathi_jax.bench.paper.deployments import DeploymentSettings
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import Comparison, comparison_table
from sarathi_jax.bench.paper.pictures import Panel, panels


@dataclasses.dataclass(frozen=True)
class Measure:
    """A product that is timed here: rows x inner times inner x columns, float32.

    Attributes:
      rows: first, last and step.
      inner, columns: of the product.
      rounds: each size once in each; the least time counts.
      quick_rounds: likewise, in the quick version.
    """

    rows: tuple[int, int, int]
    inner: int
    columns: int
    rounds: int
    quick_rounds: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is looked at.

    Attributes:
      deployments: by name.
      tokens: of a step: first, last and step.
      edge: a multiple of the tile; one token more is compared with it.
      measure: what is timed on this machine; None: nothing.
    """

    deployments: dict[str, DeploymentSettings]
    tokens: tuple[int, int, int]
    edge: int
    measure: Measure | None = None


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's numbers.

    Attributes:
      ratio: time of 257 tokens over that of 256.
    """

    ratio: float


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    first, last, apart = settings.tokens
    rooflines = {name: deployment.build().roofline() for name, deployment in settings.deployments.items()}
    rows = [
        {"deployment": name, "tokens": n, "step_s": prompt_s(roofline, n, 1), "products_s": roofline.gemms_s(n)}
        for name, roofline in rooflines.items()
        for n in sorted({*range(first, last + 1, apart), settings.edge, settings.edge + 1})
    ]
    edge, beyond = settings.edge, settings.edge + 1
    comparisons = []
    for name, roofline in rooflines.items():
        products = roofline.gemms_s(beyond) / roofline.gemms_s(edge)
        whole = prompt_s(roofline, beyond, 1) / prompt_s(roofline, edge, 1)
        comparisons += [
            Comparison(f"{name}: a layer's products, {beyond} tokens to {edge}", products, paper.ratio),
            Comparison(f"{name}: a whole step, {beyond} tokens to {edge}", whole, paper.ratio),
        ]
    drawn = [
        Panel(
            f"A step of one prompt, simulated ({next(iter(rooflines.values())).device.name})",
            {
                name: [(row["tokens"], 1e3 * row["step_s"]) for row in rows if row["deployment"] == name]
                for name in rooflines
            },
            "tokens",
            "ms",
        )
    ]
    tables = {"simulated": rows}
    text = comparison_table(comparisons)
    if settings.measure is not None:
        times = measure(settings.measure, options)
        tables["measured"] = [{"rows": n, "seconds": seconds} for n, seconds in times.items()]
        kind = jax.devices()[0].device_kind
        drawn.append(
            Panel(
                f"A product of {settings.measure.inner} x {settings.measure.columns}, measured here ({kind})",
                {"float32": [(n, 1e3 * seconds) for n, seconds in times.items()]},
                "rows",
                "ms",
            )
        )
        if edge in times and beyond in times:
            longer = times[beyond] / times[edge]
            shortest_ms, longest_ms = 1e3 * min(times.values()), 1e3 * max(times.values())
            text += (
                f"\n\nMeasured here, on {kind}: a product of {beyond} rows takes {longer:.2f} times "
                f"as long as one of {edge}; all sizes take between {shortest_ms:.3g} and {longest_ms:.3g} ms. Timings "
                "differ from run to run, and this page with them."
            )
    least, most = (extreme(one.ours for one in comparisons) for extreme in (min, max))
    return Section(
        f"{beyond} tokens take {least - 1:.0%} to {most - 1:.0%} longer than {edge} in simulation (the paper: "
        f"{paper.ratio - 1:.0%}).",
        text,
        tables,
        {"tiles": functools.partial(panels, drawn)},
    )


def measure(wanted: Measure, options: Options) -> dict[int, float]:
    """Least seconds by rows: what else the machine does only adds to them, and sizes take turns."""
    first, last, step = wanted.rows
    product = jax.jit(jnp.dot)
    right = jnp.ones((wanted.inner, wanted.columns), jnp.float32)
    times: dict[int, list[float]] = {n: [] for n in range(first, last + 1, step)}
    for round_number in range(1 + (wanted.quick_rounds if options.quick else wanted.rounds)):
        for n, seconds in times.items():
            # A fresh array each time: where one happens to lie in memory must not count as its size.
            left = jnp.ones((n, wanted.inner), jnp.float32).block_until_ready()
            began_s = time.perf_counter()
            product(left, right).block_until_ready()
            if round_number:  # the first one compiles
                seconds.append(time.perf_counter() - began_s)
    return {n: min(seconds) for n, seconds in times.items()}
