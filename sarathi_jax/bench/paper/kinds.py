"""Which module runs which kind of experiment."""

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

KINDS = (
    "ablation",
    "batch_throughput",
    "capacity",
    "chunking_overhead",
    "hybrid_iteration",
    "intensity",
    "pipeline",
    "real_ablation",
    "real_capacity",
    "real_stall",
    "real_tradeoff",
    "slo",
    "tile_quantisation",
    "tradeoff",
)


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


def module_of(kind: str) -> Any:
    """The module of a kind, see `Kind`.

    Raises:
      ExperimentError: there is none.
    """
    match kind:
        case "ablation":
            return ablation
        case "batch_throughput":
            return batch_throughput
        case "capacity":
            return capacity
        case "chunking_overhead":
            return chunking_overhead
        case "hybrid_iteration":
            return hybrid_iteration
        case "intensity":
            return intensity
        case "pipeline":
            return pipeline
        case "real_ablation":
            return real_ablation
        case "real_capacity":
            return real_capacity
        case "real_stall":
            return real_stall
        case "real_tradeoff":
            return real_tradeoff
        case "slo":
            return slo
        case "tile_quantisation":
            return tile_quantisation
        case "tradeoff":
            return tradeoff
        case _:
            raise ExperimentError(f"kind {kind!r} is none of {', '.join(KINDS)}")


def load_experiment(path: Path) -> Experiment:
    """Reads a file and looks at everything in it.

    Raises:
      ExperimentError: it cannot be run; names the file.
    """
    experiment = read_experiment(path)
    try:
        module = module_of(experiment.kind)
    except ExperimentError as error:
        raise ExperimentError(f"{path}: {error}") from None
    experiment.settings_as(module.Settings)
    experiment.paper_as(module.Paper)
    return experiment


def shipped_experiments() -> list[Experiment]:
    """All of ``configs/experiments``, by name."""
    return [load_experiment(config_path("experiments", name)) for name in config_names("experiments")]


def run(experiment: Experiment, options: Options) -> Section:
    """Runs an experiment by its kind."""
    return module_of(experiment.kind).run(experiment, options)
