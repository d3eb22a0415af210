"""Which module runs which kind of experiment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sarathi_jax.bench.paper import (
    ablation,
    batch_throughput,
    capacity,
    chunking_overhead,
    hybrid_iteration,
    intensity,
    pipeline,
    real_ablation,
    real_capacity,
    real_stall,
    real_tradeoff,
    slo,
    tile_quantisation,
    tradeoff,
)
from sarathi_jax.bench.paper.experiment import Experiment, ExperimentError, Options, Section, read_experiment
from sarathi_jax.resources import config_names, config_path


class Kind(Protocol):
    """What a module of a kind has.

    Attributes:
      Settings, Paper: dataclasses of what its files say under ``settings`` and ``paper``.
    """

    Settings: type[Any]
    Paper: type[Any]

    @staticmethod
    def run(experiment: Experiment, options: Options) -> Section:
        """Runs an experiment; the same arguments give the same section, but for what is measured on this machine."""
        ...


_KINDS: Mapping[str, Kind] = {
    "ablation": ablation,
    "batch_throughput": batch_throughput,
    "capacity": capacity,
    "chunking_overhead": chunking_overhead,
    "hybrid_iteration": hybrid_iteration,
    "intensity": intensity,
    "pipeline": pipeline,
    "real_ablation": real_ablation,
    "real_capacity": real_capacity,
    "real_stall": real_stall,
    "real_tradeoff": real_tradeoff,
    "slo": slo,
    "tile_quantisation": tile_quantisation,
    "tradeoff": tradeoff,
}


def load_experiment(path: Path) -> Experiment:
    """Reads a file and looks at everything in it.

    Raises:
      ExperimentError: it cannot be run; names the file.
    """
    experiment = read_experiment(path)
    kind = _KINDS.get(experiment.kind)
    if kind is None:
        raise ExperimentError(f"{path}: kind {experiment.kind!r} is none of {', '.join(_KINDS)}")
    experiment.settings_as(kind.Settings)
    experiment.paper_as(kind.Paper)
    return experiment


def shipped_experiments() -> list[Experiment]:
    """All of ``configs/experiments``, by name."""
    return [load_experiment(config_path("experiments", name)) for name in config_names("experiments")]


def run(experiment: Experiment, options: Options) -> Section:
    """Runs an experiment by its kind."""
    return _KINDS[experiment.kind].run(experiment, options)
