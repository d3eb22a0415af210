"""Turns a model directory of one format into a new one of the other."""

import os
from pathlib import Path
from typing import Literal

from sarathi_jax.config import ConfigError, Dtype
from sarathi_jax.weights.checkpoint import DEFAULT_SHARD_BYTES, load_parameters, save_hf, save_orbax, stored_dtype
from sarathi_jax.weights.directory import CONFIG_FILE, check_target, load_model_config, read_json

Format = Literal["hf", "orbax"]
FORMATS: tuple[Format, ...] = ("hf", "orbax")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    target_format: Format,
    *,
    dtype: Dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes the model of `source` to `target`, with its ``config.json``, tokenizer and chat template.

    The target appears whole or not at all, and the source is only read.

    Args:
      source: a Hugging Face or Orbax model directory.
      target: the directory to make; must not exist or be empty.
      target_format: ``hf`` (safetensors) or ``orbax``.
      dtype: of the written weights; None: what holds the stored values exactly.
      shard_bytes: largest safetensors file.
      progress: show progress bars.

    Raises:
      ConfigError: an unknown format or dtype, or a model that is not supported.
      WeightsError: unreadable weights, a target that is not empty, or a full disk.
    """
    if target_format not in FORMATS:
        raise ConfigError(f"target format {target_format!r} is not one of {', '.join(FORMATS)}")
    check_target(Path(target))
    config = load_model_config(source)
    fields = read_json(Path(source) / CONFIG_FILE)
    parameters = load_parameters(source, config, dtype or stored_dtype(source, config), progress=progress)
    if target_format == "orbax":
        save_orbax(target, config, parameters, companions_from=source, fields=fields)
    else:
        save_hf(
            target,
            config,
            parameters,
            shard_bytes=shard_bytes,
            companions_from=source,
            fields=fields,
            progress=progress,
        )
