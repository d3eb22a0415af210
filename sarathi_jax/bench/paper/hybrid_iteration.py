"""How much longer an iteration of decodes takes with a whole prompt in it, and with a chunk of one."""

import dataclasses
import functools
import itertools

from sarathi_jax.bench.paper.batch_throughput import decode_s
from sarathi_jax.bench.paper.deployments import DeploymentSettings
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import Comparison, comparison_table, table
from sarathi_jax.bench.paper.pictures import Panel, panels
from sarathi_jax.latency import Roofline, Work, chunk_keys


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is looked at.

    Attributes:
      deployments: by name.
      decodes: of a batch.
      context: tokens in the cache of each.
      prompts: lengths.
      budget: tokens of a step with a chunk.
    """

    deployments: dict[str, DeploymentSettings]
    decodes: tuple[int, ...]
    context: int
    prompts: tuple[int, ...]
    budget: int


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's numbers.

    Attributes:
      largest_ratio: of an iteration with a whole prompt to one without.
    """

    largest_ratio: float


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    rows = []
    for name, deployment in settings.deployments.items():
        roofline = deployment.build().roofline()
        for decodes, prompt in itertools.product(settings.decodes, settings.prompts):
            alone_s = decode_s(roofline, decodes, settings.context)
            whole_s = mixed_s(roofline, decodes, settings.context, 0, prompt)
            length = min(prompt, settings.budget - decodes)
            # The last chunk reads the most keys: it takes the longest.
            chunk_s = mixed_s(roofline, decodes, settings.context, prompt - length, length)
            rows.append(
                {
                    "deployment": name,
                    "decodes": decodes,
                    "prompt": prompt,
                    "decodes_s": alone_s,
                    "with_whole_prompt_s": whole_s,
                    "with_chunk_s": chunk_s,
                    "whole_ratio": whole_s / alone_s,
                    "chunk_ratio": chunk_s / alone_s,
                }
            )
    worst = max(rows, key=lambda row: row["whole_ratio"])
    chunked = max(rows, key=lambda row: row["chunk_ratio"])
    nearest = min(rows, key=lambda row: abs(row["whole_ratio"] / paper.largest_ratio - 1))
    text = "\n\n".join(
        [
            comparison_table(
                [
                    Comparison(
                        "longest iteration with a whole prompt, to decodes alone",
                        worst["whole_ratio"],
                        paper.largest_ratio,
                        why=f"ours: {_words(worst)}; the nearest to the paper's is {nearest['whole_ratio']:.3g}: "
                        f"{_words(nearest)}",
                    ),
                    Comparison(
                        f"the same with a chunk (budget {settings.budget})", chunked["chunk_ratio"], why=_words(chunked)
                    ),
                ]
            ),
            table(
                ["deployment", "decodes", "prompt", "decodes alone", "+ whole prompt", "+ last chunk", "ratios"],
                [
                    [
                        row["deployment"],
                        row["decodes"],
                        row["prompt"],
                        f"{1e3 * row['decodes_s']:.1f} ms",
                        f"{1e3 * row['with_whole_prompt_s']:.0f} ms",
                        f"{1e3 * row['with_chunk_s']:.0f} ms",
                        f"{row['whole_ratio']:.1f} / {row['chunk_ratio']:.1f}",
                    ]
                    for row in rows
                ],
            ),
        ]
    )
    most = settings.decodes[-1]
    drawn = []
    for name in settings.deployments:
        own = [row for row in rows if row["deployment"] == name and row["decodes"] == most]
        drawn.append(
            Panel(
                f"{name}, {most} decodes",
                {
                    "hybrid_only: whole prompt": [(row["prompt"], 1e3 * row["with_whole_prompt_s"]) for row in own],
                    f"sarathi: last chunk, budget {settings.budget}": [
                        (row["prompt"], 1e3 * row["with_chunk_s"]) for row in own
                    ],
                    "decodes alone": [(row["prompt"], 1e3 * row["decodes_s"]) for row in own],
                },
                "tokens of the prompt",
                "ms of the iteration",
                x_scale="log",
                y_scale="log",
            )
        )
    return Section(
        f"A whole prompt makes an iteration up to {worst['whole_ratio']:.1f} times as long (the paper: "
        f"{paper.largest_ratio:g}), a chunk of {settings.budget} at most {chunked['chunk_ratio']:.1f} times.",
        text,
        {"iterations": rows},
        {"iterations": functools.partial(panels, drawn)},
    )


def mixed_s(roofline: Roofline, decodes: int, context: int, start: int, length: int) -> float:
    """Seconds of a step of decodes and one chunk of a prompt."""
    keys = chunk_keys(start, length)
    return roofline.work_s(Work(decodes + length, decodes, decodes * (context + 1), keys, decodes + 1))


def _words(row: dict) -> str:
    return f"{row['deployment']}, {row['decodes']} decodes, prompt of {row['prompt']}"
