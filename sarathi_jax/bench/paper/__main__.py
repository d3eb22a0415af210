"""The command behind ``make paper``; see the package."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from tqdm import tqdm

from sarathi_jax.bench.paper.experiment import ExperimentError, Options
from sarathi_jax.bench.paper.kinds import run, shipped_experiments
from sarathi_jax.bench.paper.report import write_index, write_page
from sarathi_jax.workloads.traces import DATA_VARIABLE

_ONLY = flags.DEFINE_list("only", [], "names of configs/experiments, comma-separated; empty: all")
_QUICK = flags.DEFINE_boolean("quick", False, "small versions of all, to see that they work")
_OUT = flags.DEFINE_string("out", None, "folder of the pages; None: docs/paper, of quick ones build/paper")
_PROCESSES = flags.DEFINE_integer("processes", 2, "that share the simulations of an experiment", lower_bound=1)
_DATA = flags.DEFINE_string(
    "data", None, f"folder of published measurements to compare with; None: what {DATA_VARIABLE} names, if anything"
)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every read, across the bars
    experiments = shipped_experiments()
    names = [experiment.name for experiment in experiments]
    unknown = [name for name in _ONLY.value if name not in names]
    if unknown:
        raise ExperimentError(f"there is no experiment {', '.join(unknown)}; there are {', '.join(names)}")
    data = _DATA.value or os.environ.get(DATA_VARIABLE)
    if data and not Path(data).is_dir():
        raise ExperimentError(f"{data} is no folder of measurements; correct --data or {DATA_VARIABLE}")
    options = Options(_QUICK.value, _PROCESSES.value, Path(data) if data else None)
    folder = Path(_OUT.value or ("build/paper" if options.quick else "docs/paper"))
    chosen = [experiment for experiment in experiments if not _ONLY.value or experiment.name in _ONLY.value]
    for experiment in (bar := tqdm(chosen, unit="experiment", file=sys.stderr)):
        bar.set_description(experiment.name)
        write_page(experiment, run(experiment, options), folder, options)
    print(f"wrote {write_index(experiments, folder)}")


if __name__ == "__main__":
    try:
        app.run(main)
    except ExperimentError as error:
        sys.exit(str(error))
