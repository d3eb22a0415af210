"""The flags that say which model is served and how, for every verb that serves one."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from sarathi_jax.cli.fields import UsageError, define_fields, given_fields
from sarathi_jax.config import DTYPES, ConfigError, EngineConfig
from sarathi_jax.deployment import load_deployment
from sarathi_jax.resources import config_names


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """What the flags say: arguments of `LLM`.

    Attributes:
      engine: fields of `EngineConfig`.
    """

    model: Path | None
    dtype: Any
    engine: dict[str, Any]


def define_model_flags(values: flags.FlagValues, skip: tuple[str, ...] = ()) -> None:
    """Defines the model's flags, then every engine parameter.

    Args:
      values: where the flags go.
      skip: fields of `EngineConfig` that this verb does not have.
    """
    flags.DEFINE_string("model", None, "model folder; without it the small model that ships.", flag_values=values)
    flags.DEFINE_string(
        "deployment",
        None,
        f"model, mesh and settings from a YAML file, or one of {', '.join(config_names('deployments'))}; flags beside "
        "it go before what it says.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", *DTYPES], "of weights and cache; auto: as the model is stored.", flag_values=values
    )
    define_fields(values, EngineConfig, skip=("dtype", *skip))  # --dtype knows one word more


def model_arguments(values: flags.FlagValues, skip: tuple[str, ...] = ()) -> ModelArguments:
    """What the command line says of the model, a deployment filling in what it leaves open.

    Args:
      values: with the flags of `define_model_flags`.
      skip: as there.

    Raises:
      UsageError: a deployment or values that cannot be.
    """
    engine, model, dtype = given_fields(values, EngineConfig, skip=("dtype", *skip)), values.model, values.dtype
    try:
        if values.deployment is not None:
            deployed = load_deployment(values.deployment)
            its_model, its_dtype = deployed.pop("model", None), deployed.pop("dtype", dtype)
            model = its_model if model is None else model
            dtype = dtype if values["dtype"].present else its_dtype
            engine = deployed | engine
        EngineConfig(**engine)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return ModelArguments(None if model is None else Path(model).expanduser(), dtype, engine)
