"""Deployments: which model, on which mesh, with which settings, in one YAML file."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from sarathi_jax.config import ConfigError, EngineConfig, read_yaml
from sarathi_jax.resources import ResourceError, config_names, config_path

_OF_THE_MACHINE = ("host_id", "coordinator")


def load_deployment(deployment: str | Path) -> dict[str, Any]:
    """The arguments of `LLM` that a deployment stands for.

    Args:
      deployment: a name of ``configs/deployments``, or the path of a YAML file: ``model`` (a name of
        ``configs/models``, or a path relative to the file; without it the model that ships) and fields of
        `EngineConfig`, which mean what they do there.

    Raises:
      ConfigError: no such file, an unknown key, or a value that cannot be.
    """
    path = Path(deployment).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        try:
            path = config_path("deployments", str(deployment))
        except ResourceError as error:
            raise ConfigError(f"{error}; or give the path of a .yaml file") from None
    fields = read_yaml(path)
    known = [field.name for field in dataclasses.fields(EngineConfig) if field.name not in _OF_THE_MACHINE]
    for key in fields:
        if key != "model" and key not in known:
            near = difflib.get_close_matches(str(key), ["model", *known], n=1)
            hint = f"do you mean {near[0]}?" if near else f"there are model, {', '.join(known)}"
            if key in _OF_THE_MACHINE:
                hint = "it differs from machine to machine: give it as a flag or an argument"
            raise ConfigError(f"{path}: unknown key {key!r}; {hint}")
    # YAML knows lists, the configuration tuples.
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    settings: dict[str, Any] = {key: value for key, value in arguments.items() if key not in ("model", "dtype")}
    try:
        EngineConfig(**settings)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    model = arguments.get("model")
    if isinstance(model, str):
        is_name = model in config_names("models")
        arguments["model"] = config_path("models", model) if is_name else path.parent / Path(model).expanduser()
    return arguments
