"""Pages of the experiments and their index. The same sections give the same files, byte by byte."""

import csv
import shutil
from pathlib import Path

import yaml

from sarathi_jax.bench.paper.experiment import Experiment, Options, Section

INDEX = "README.md"
_VERDICT = "**In one line:** "
_INTRODUCTION = """# The paper's experiments

Every figure and table of Sarathi-Serve (OSDI 2024) that this project repeats, ours beside the paper's. `make paper`
makes this folder; `make paper ARGS="--only NAME"` makes one page anew; `ARGS=--quick` makes small versions in
`build/paper`, to see that everything works. What is run stands in `configs/experiments/NAME.yaml`.

Figures of the paper's size are simulated: the server's own scheduler and block pool on a clock, with step times from a
roofline whose constants were fitted to published kernel and iteration times, before any of these experiments was run.
Pages of titles that say "measured" are not: there the engine itself serves the small model that ships, in real time, on
the device that the page names.
"""


def write_page(experiment: Experiment, section: Section, folder: Path, options: Options) -> Path:
    """Writes a page with its pictures and tables.

    Args:
      experiment: that was run.
      section: what came of it.
      folder: of all pages.
      options: how it was run.

    Returns:
      Path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_picture(experiment, name, section, folder) for name in section.pictures]
    tables = [_table(experiment, name, section, folder) for name in section.tables]
    quick = ["This is the quick version: too small to be quoted."] if options.quick else []
    flags = f"--only {experiment.name}" + (" --quick" if options.quick else "")
    settings = yaml.safe_dump(dict(experiment.settings), sort_keys=False, allow_unicode=True, width=110)
    parts = [
        f"# {experiment.title}",
        _VERDICT + section.verdict,
        *quick,
        experiment.asks,
        *(f"![{path.stem}]({path.name})" for path in pictures),
        section.text.strip(),
        *([f"## What we make of it\n\n{experiment.notes}"] if experiment.notes and not options.quick else []),
        *(["Numbers: " + ", ".join(f"[{path.name}]({path.name})" for path in tables)] if tables else []),
        f"## Settings\n\n```yaml\n{settings}```",
        f'Made by `make paper ARGS="{flags}"`.',
    ]
    page = folder / f"{experiment.name}.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def write_index(experiments: list[Experiment], folder: Path) -> Path:
    """Writes the index of the pages that the folder has, each with its verdict.

    Args:
      experiments: all that there are, in the order of the index.
      folder: of all pages.
    """
    rows = ["| experiment | in one line |", "| --- | --- |"]
    for experiment in experiments:
        page = folder / f"{experiment.name}.md"
        if page.is_file():
            rows.append(f"| [{experiment.title}]({page.name}) | {_verdict_of(page)} |")
    index = folder / INDEX
    index.write_text(_INTRODUCTION + "\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return index


def _verdict_of(page: Path) -> str:
    lines = page.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix(_VERDICT) for line in lines if line.startswith(_VERDICT)), "")


def _picture(experiment: Experiment, name: str, section: Section, folder: Path) -> Path:
    drawn = section.pictures[name]
    path = folder / f"{experiment.name}-{name}{drawn.suffix if isinstance(drawn, Path) else '.svg'}"
    if isinstance(drawn, Path):
        shutil.copyfile(drawn, path)
    else:
        drawn(path)
    return path


def _table(experiment: Experiment, name: str, section: Section, folder: Path) -> Path:
    rows = section.tables[name]
    path = folder / f"{experiment.name}-{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        # Nine digits: more than anybody reads, fewer than machines differ in.
        writer.writerows({key: f"{v:.9g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return path
