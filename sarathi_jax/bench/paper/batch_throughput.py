"""Throughput of prompts and of decodes against the size of the batch."""

import dataclasses
import functools

from sarathi_jax.bench.paper.deployments import DeploymentSettings
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import Comparison, comparison_table
from sarathi_jax.bench.paper.pictures import Panel, panels
from sarathi_jax.latency import Roofline, Work, chunk_keys
from sarathi_jax.latency.fit import read_iterations


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is looked at.

    Attributes:
      deployments: by name.
      batch_sizes: ascending, from 1.
      prompt: tokens of each prompt.
      context: tokens in the cache of each sequence that decodes.
    """

    deployments: dict[str, DeploymentSettings]
    batch_sizes: tuple[int, ...]
    prompt: int
    context: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """An iteration of the paper's stack.

    Attributes:
      deployment: name in the settings.
      decodes, prompt: tokens of each kind.
      seconds: it took.
    """

    deployment: str
    seconds: float
    decodes: int = 0
    prompt: int = 0


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's numbers.

    Attributes:
      iterations: measured ones.
      files: of the artifact with more of them, by deployment; drawn if they are at hand.
    """

    iterations: tuple[Measured, ...]
    files: dict[str, tuple[str, ...]]


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    rooflines = {name: deployment.build().roofline() for name, deployment in settings.deployments.items()}
    rows = [
        {
            "deployment": name,
            "batch_size": size,
            "prompt_tokens_per_s": size * settings.prompt / prompt_s(roofline, settings.prompt, size),
            "decode_tokens_per_s": size / decode_s(roofline, size, settings.context),
        }
        for name, roofline in rooflines.items()
        for size in settings.batch_sizes
    ]
    comparisons = []
    for one in paper.iterations:
        roofline = rooflines[one.deployment]
        if one.decodes:
            what, seconds = f"{one.decodes} decodes", decode_s(roofline, one.decodes, settings.context)
        else:
            what, seconds = f"a prompt of {one.prompt}", prompt_s(roofline, one.prompt, 1)
        comparisons.append(Comparison(f"{one.deployment}: {what}", 1e3 * seconds, 1e3 * one.seconds, "ms"))
    gains = {
        name: {
            kind: _rate(rows, name, settings.batch_sizes[-1], kind) / _rate(rows, name, 1, kind)
            for kind in ("prompt", "decode")
        }
        for name in rooflines
    }
    largest = settings.batch_sizes[-1]
    text = (
        comparison_table(comparisons)
        + "\n\n"
        + "\n".join(
            f"- {name}: {largest} prompts at once are computed {of['prompt']:.2f} times as fast as one, "
            f"{largest} decodes {of['decode']:.1f} times."
            for name, of in gains.items()
        )
    )
    measured = _measured(paper, options)
    drawn = []
    for kind, title, scale in (
        ("prompt", f"Prompts of {settings.prompt} tokens", "linear"),
        ("decode", "Decodes", "log"),
    ):
        lines = {name: [(n, _rate(rows, name, n, kind)) for n in settings.batch_sizes] for name in rooflines}
        points = {name: found for name in rooflines if (found := measured.get((name, kind)))}
        drawn.append(Panel(title, lines, "batch size", "tokens/s", marks=points, x_scale="log", y_scale=scale))
    worst = max(comparisons, key=lambda one: abs((one.ratio or 1) - 1))
    first = next(iter(gains))
    return Section(
        f"{largest} prompts at once are {gains[first]['prompt']:.2f} times as fast as one, {largest} decodes "
        f"{gains[first]['decode']:.0f} times ({first}); the measured iterations are met to within "
        f"{abs((worst.ratio or 1) - 1):.0%}.",
        text,
        {"throughput": rows},
        {"throughput": functools.partial(panels, drawn)},
    )


def prompt_s(roofline: Roofline, length: int, number: int) -> float:
    """Seconds of a step of so many whole prompts."""
    return roofline.work_s(Work(number * length, num_prefill_keys=number * chunk_keys(0, length), num_sequences=number))


def decode_s(roofline: Roofline, number: int, context: int) -> float:
    """Seconds of a step of so many decodes, each with so many tokens in the cache."""
    return roofline.work_s(Work(number, number, number * (context + 1), 0, number))


def _rate(rows: list[dict], name: str, size: int, kind: str) -> float:
    return next(row[f"{kind}_tokens_per_s"] for row in rows if row["deployment"] == name and row["batch_size"] == size)


def _measured(paper: Paper, options: Options) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Batch sizes and tokens a second, by deployment and kind; a prompt is a batch of one, whatever its length."""
    points = dict[tuple[str, str], list[tuple[float, float]]]()
    for name, files in paper.files.items():
        for path in filter(None, map(options.find, files)):
            for iteration in read_iterations(path):
                work = iteration.works[0]
                if work.num_decodes == work.num_tokens:
                    points.setdefault((name, "decode"), []).append(
                        (work.num_tokens, work.num_tokens / iteration.seconds)
                    )
    return points
