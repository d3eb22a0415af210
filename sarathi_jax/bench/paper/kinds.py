"""Which module runs which kind of experiment."""

from pathlib import Path
from typing import Any, Protocol

from sarathi_jax.bench.paper import capacity, intensity, slo, tradeoff
from sarathi_jax.bench.paper.experiment import Experiment, ExperimentError, Options, Section, read_experiment
from sarathi_jax.resources import config_names, config_path

KINDS = ("capacity", "intensity", "slo", "tradeoff")


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
        case "capacity":
            return capacity
        case "intensity":
            return intensity
        case "slo":
            return slo
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
