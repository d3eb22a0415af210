"""What cutting a prompt into chunks costs the prompt itself."""

import dataclasses
import functools
from pathlib import Path

from sarathi_jax.bench.paper.deployments import DeploymentSettings
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import Comparison, comparison_table, table
from sarathi_jax.bench.paper.pictures import Panel, panels
from sarathi_jax.latency import Roofline
from sarathi_jax.latency.fit import prompt_works, read_prefills


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is looked at.

    Attributes:
      stacks: deployments by name; the first is compared with the paper.
      prompts: lengths.
      chunks: sizes of chunks.
    """

    stacks: dict[str, DeploymentSettings]
    prompts: tuple[int, ...]
    chunks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's numbers.

    Attributes:
      largest: the most that chunks of a size cost, to the whole prompt.
      file: of the artifact, with every cell; compared if it is at hand.
    """

    largest: dict[int, float]
    file: str


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    measured = _measured(options.find(paper.file))
    rows = []
    for stack, deployment in settings.stacks.items():
        roofline = deployment.build().roofline()
        for prompt in settings.prompts:
            for chunk in settings.chunks:
                ratio = overhead(roofline, prompt, chunk)
                rows.append({"stack": stack, "prompt": prompt, "chunk": chunk, "to_whole": ratio})
    first = next(iter(settings.stacks))
    comparisons = []
    for chunk in settings.chunks:
        own = [row for row in rows if row["stack"] == first and row["chunk"] == chunk]
        worst = max(own, key=lambda row: row["to_whole"])
        words = f"chunks of {chunk}: the most they cost ({first})"
        comparisons.append(Comparison(words, worst["to_whole"], paper.largest.get(chunk)))
    parts = [comparison_table(comparisons)]
    # Prompts of the file are a token short of a power of two.
    errors = {
        (row["prompt"], row["chunk"]): row["to_whole"] - theirs
        for row in rows
        if row["stack"] == first and (theirs := measured.get((row["prompt"] - 1, row["chunk"]))) is not None
    }
    if errors:
        cells = [
            [
                prompt,
                *(
                    f"{_ratio(rows, first, prompt, chunk):.2f} / {measured[prompt - 1, chunk]:.2f}"
                    for chunk in settings.chunks
                ),
            ]
            for prompt in settings.prompts
        ]
        parts.append("Every cell, ours / measured by the paper's artifact:")
        parts.append(table(["prompt", *(f"chunks of {chunk}" for chunk in settings.chunks)], cells))
    else:
        cells = [
            [prompt, *(f"{_ratio(rows, first, prompt, chunk):.2f}" for chunk in settings.chunks)]
            for prompt in settings.prompts
        ]
        parts.append(f"Every cell; the artifact's ({paper.file}) are compared where `--data` has them:")
        parts.append(table(["prompt", *(f"chunks of {chunk}" for chunk in settings.chunks)], cells))
    drawn = [
        Panel(
            stack.capitalize(),
            {
                f"chunks of {chunk}": [(prompt, _ratio(rows, stack, prompt, chunk)) for prompt in settings.prompts]
                for chunk in settings.chunks
            },
            "tokens of the prompt",
            "time, to the whole prompt at once",
            marks={
                f"chunks of {chunk}": points
                for chunk in settings.chunks
                if stack == first
                and (points := [(p, measured[p - 1, chunk]) for p in settings.prompts if (p - 1, chunk) in measured])
            },
            x_scale="log",
            horizontals={"whole": 1.0},
            from_zero=False,
        )
        for stack in settings.stacks
    ]
    worst = max(comparisons, key=lambda one: one.ours)
    short = [abs(error) for (prompt, _), error in errors.items() if prompt <= 8192]
    within = f"; up to 8k within {max(short):.2f} of every measured cell" if short else ""
    return Section(
        f"Chunks cost a prompt at most {worst.ours:.2f} of its time at once (the paper: about "
        f"{max(paper.largest.values()):g}){within}.",
        "\n\n".join(parts),
        {"overhead": rows},
        {"overhead": functools.partial(panels, drawn)},
    )


def overhead(roofline: Roofline, prompt: int, chunk: int) -> float:
    """Time of a prompt in chunks to that of the prompt at once."""
    in_chunks, whole = (sum(map(roofline.work_s, prompt_works(prompt, size))) for size in (chunk, prompt))
    return in_chunks / whole


def _ratio(rows: list[dict], stack: str, prompt: int, chunk: int) -> float:
    return next(
        row["to_whole"] for row in rows if (row["stack"], row["prompt"], row["chunk"]) == (stack, prompt, chunk)
    )


def _measured(path: Path | None) -> dict[tuple[int, int], float]:
    """Ratios by prompt and chunk."""
    if path is None:
        return {}
    prefills = read_prefills(path)
    whole = {length: one.seconds for length, chunk, one in prefills if chunk >= length}
    whole |= {length: one.seconds for length, chunk, one in prefills if chunk == max(c for _, c, _ in prefills)}
    return {(length, chunk): one.seconds / whole[length] for length, chunk, one in prefills}
